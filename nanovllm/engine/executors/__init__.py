"""Where steps are carried out: in this process, in one for each rank, in actors of Ray, in torchrun's processes."""
