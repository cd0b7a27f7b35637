"""From image files on disk to normalised batches.

    recordio, verification_set, template_protocol   the file formats face recognition data is shipped in, read and written
    sources, index                                  random access to encoded images and their labels
    sampler                                         which images each rank sees, in which order
    images                                          encoded image -> RGB face
    loader                                          make_loader: source + sampler -> batches, by DALI (dali) or PyTorch (torch_loader)
    faces, degradations, synthetic                  a data set of drawn faces in the same formats
"""
