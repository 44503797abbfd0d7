from archscale.cli import main

main()
