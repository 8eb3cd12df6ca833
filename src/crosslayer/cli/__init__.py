"""The command line: one module per verb. Heavy imports wait until a verb runs."""


def main() -> None:
    """Entry point. Ends the process."""
    from . import interrupt

    interrupt.watch()
    try:
        from .app import run

        run()
    except KeyboardInterrupt:
        interrupt.end()


__all__ = ["main"]
