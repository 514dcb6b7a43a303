"""All that touches media files: probe, index, choice of samples, decoding, pictures.

The errors of this package, drawn once:

    FootageError            the file cannot be read now, or is not the file that was probed
    └── Rejected            what was found is not a video that can be analysed; `kind` says why

`sample` and `index` import neither PyAV nor OpenCV, so that planning needs no decoder.
"""
