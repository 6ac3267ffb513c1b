from ccpo.cli import main

main()
