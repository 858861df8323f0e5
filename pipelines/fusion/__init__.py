"""Several runs over the same images, made into one."""
