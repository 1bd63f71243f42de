"""Say what is on a photograph: python examples/predict.py PHOTOGRAPH"""

import sys

import numpy as np

from gcvit import PRESETS, GCViT
from gcvit.images import normalize, read_photograph, resize
from gcvit.readers import class_names
from gcvit.weights import locate

preset = PRESETS["gcvit_nano"]  # ships with the package, and knows 200 kinds of things
names = class_names(locate(preset["weights"]["tiny_imagenet"]))
model = GCViT.from_preset("gcvit_nano")

photograph = read_photograph(sys.argv[1])  # (height, width, 3) uint8
image = normalize(resize(photograph, preset["image_size"], preset["crop"]))
probabilities = model.predict(image[np.newaxis], verbose=0)[0]
for k in np.argsort(-probabilities)[:5]:
    print(f"{probabilities[k]:.3f}  {names[k]}")
