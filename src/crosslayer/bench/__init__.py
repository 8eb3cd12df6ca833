"""What methods cost at one shape, measured: the contenders, their activation memory, their speed."""
