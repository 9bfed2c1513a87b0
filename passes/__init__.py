"""What the compiler has many of, a file each: methods, parameterisations, storages, kinds of site, fusions."""
