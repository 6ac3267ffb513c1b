"""C code for processors that multiply bfloat16, and how it is compiled and found out to be right."""
