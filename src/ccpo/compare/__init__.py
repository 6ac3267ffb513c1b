"""``ccpo compare``: methods × tasks × seeds at equal generated tokens, with the statistics that make the comparison a fair one."""
