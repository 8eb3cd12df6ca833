"""`python -m crosslayer`, for launchers such as `accelerate launch -m crosslayer`."""

from .cli import main

main()
