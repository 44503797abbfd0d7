from archscale.cli import main

if __name__ == "__main__":  # processes that a command spawns import this module too
    main()
