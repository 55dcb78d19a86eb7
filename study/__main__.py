"""``python -m study <verb>``, in this process or in a child of one that has imported already."""


def run() -> None:
    """Run the command of ``sys.argv``."""
    from study.warm import hand_over

    hand_over()
    from study.cli import main

    main()


run()
