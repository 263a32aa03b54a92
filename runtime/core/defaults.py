"""Defaults that the Python API and the command line share."""

TARGET = "cpu:int8"
GROUP_SIZE = 32  # quantized weights that share a scale
KV_CACHE = "auto"  # int8 for keys and values: no answer of the demo changes, and it is a quarter of the bytes
MAX_NEW_TOKENS = 256
CHUNK_TOKENS = 512  # the most prompt tokens in one step
MAX_IMAGE_PIXELS = 50_000_000
MAX_VIDEO_FRAMES = 768  # that are taken of a video; more are left out evenly
MAX_LISTED_FRAMES = 1 << 14  # of a video that is a list of images
MAX_FILE_FRAMES = 1 << 20  # of a video file, most of them left out
MAX_VIDEO_PIXELS = 4096 * 2304  # of a frame of a video file
MAX_VIDEO_BYTES = 1 << 30  # of a video file
VIDEO_SECONDS = 120  # that reading and decoding a video file may take
LARGE_IMAGE_TOKENS = 2048  # more of a prompt are told on a terminal before its images are encoded
CACHE_SHARE = 0.25  # of the memory that is free when an engine was loaded, for what requests keep between steps
FEATURE_MEMORY = 256 << 20  # bytes, for features of images that come again
WAITING = 256  # requests that wait for their first token
AHEAD = 32  # pieces that wait for a client before its request is left out of steps
