"""From image files on disk to normalized batches.

recordio, verification_set, template_protocol   the file formats face recognition data is shipped in, read and written
record_index, tar_shards, tfrecord (crc32c),
image_list, image_folder                        each kind of data set as a source, by an index kept beside it (indexed)
sources, index                                  random access to encoded images and their labels; open_source, whatever the format
convert                                         a data set in another format
sampler, selection                              which images each rank sees, in which order (hashing: the random numbers)
images, broken, augmentation                    encoded image -> RGB face; what takes the place of broken ones; random changes
loader                                          make_loader: source + sampler -> batches, by DALI (dali) or PyTorch (torch_loader)
faces, degradations, synthetic                  a data set of drawn faces in the same formats
"""

if __name__ == "pipelines":  # found in a checkout's top folder, by its short name
    from scf_fast.checkout_names import hand_over

    hand_over(__name__)
