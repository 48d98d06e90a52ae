"""What a card must show: each test runs on `cuda` if there is one, and on the CPU with stand-ins."""
