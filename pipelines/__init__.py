"""From image files on disk to normalized batches.

index              opens any data set by its path, and reports on one
convert            writes a data set in another format
loader             make_loader: source + sampler -> batches, by DALI or by PyTorch workers
command, errors    how commands parse arguments and end; InputError
formats/           bytes to records and back; how files are written
sources/           data sets of every format, with random access to images and labels
sampling/          which images each rank sees, in which order, with which random numbers
loading/           decoding, augmentation, replacement of broken images, the two loaders
evaluation_sets/   verification pairs and template protocols
synthetic/         a data set of drawn faces in the same formats
"""

if __name__ == "pipelines":  # found in a checkout's top folder, by its short name
    from scf_fast.checkout_names import hand_over

    hand_over(__name__)
