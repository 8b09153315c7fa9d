"""The command `nsm-book`, which says in one line when the extra that it needs is not installed."""

import sys


def main() -> None:
    try:
        from nsm_book.cli import main as command

        command()
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("nsm_"):
            raise
        sys.exit(f"nsm-book: {error.name} is not installed; the extra 'book' brings it: pip install 'nsm-support[book]'")


if __name__ == "__main__":
    main()
