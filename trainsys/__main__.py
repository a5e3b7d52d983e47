"""``python -m trainsys``, and what torchrun starts on every rank."""

from trainsys.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
