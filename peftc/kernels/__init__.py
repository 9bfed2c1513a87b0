"""Operations that PyTorch has no single one for: one a file, with what they compute on each kind of device."""
