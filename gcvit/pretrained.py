"""Chapter 7: what a model does besides computing: presets, files, and leaving Keras."""

import contextlib
import difflib
import gc
import os
import warnings

import keras
import numpy as np

from gcvit import readers
from gcvit import weights as checkpoints
from gcvit.checks import labels_within, not_normalized, pair
from gcvit.presets import PRESETS

# Pixels of the image for each token of the window's side, level by level, where windows
# are scaled with the image: 224 px give windows of 7, 7, 14 and 7.
_WINDOW_RATIO = (32, 32, 16, 32)


def scaled_windows(image_size):
    """Return the windows of the four levels that grow and shrink with the image.

    Args:
        image_size: side of the image in pixels, or its (height, width); multiples of 32.

    Returns:
        Four (height, width) pairs.

    Raises:
        ValueError: if a side is not a multiple of 32.

    Source: timm, `gcvit.py`, `window_ratio`.
    """
    sides = pair("image_size", image_size)
    if any(side % 32 for side in sides):
        raise ValueError(
            "Windows can only be scaled to an image whose sides are multiples of 32; got "
            f"{sides[0]} x {sides[1]} px. For any other size, keep the preset's windows: "
            "leave image_size out and pass images of the size you have."
        )
    return tuple(tuple(side // ratio for side in sides) for ratio in _WINDOW_RATIO)


class PretrainedModel(keras.Model):
    """A model that is built from presets and reads and writes checkpoints, all or nothing.

    A subclass has the layers that `weights.sublayers` names, `in_channels`, and the size of the
    images that it was built for in `built_size`, (height, width) in pixels or `None`.
    """

    @classmethod
    def from_preset(cls, preset, weights="default", image_size=None, new_head=False, **overrides):
        """Build a published variant, with its weights.

        Args:
            preset: a name in `gcvit.PRESETS`.
            weights: a name that the preset lists (`PRESETS[preset]["weights"]`), which is
                fetched once into Keras's cache; a path to a file; or `None` for random
                weights. Default "default": the first that the preset lists.
            image_size: side in pixels, or (height, width), to scale the windows to.
                Default: the preset's windows are kept, and any image is taken.
            new_head: leave the head at random, even where the checkpoint's has as many
                classes; default `False`.
            **overrides: constructor arguments that replace the preset's. With another
                `num_classes`, the head starts at random; with another `in_channels`, the
                first kernel is summed or repeated. A line says so.

        Returns:
            A built model.

        Raises:
            ValueError: for an unknown preset or weights, with the nearest names.
            gcvit.CheckpointError: for a file that is not this model's checkpoint.
            gcvit.FetchError: if the weights cannot be fetched.
        """
        entry = _nearest("preset", preset, PRESETS)
        size = pair("image_size", image_size or entry["image_size"])
        config = {**entry["config"], **overrides}
        if image_size is not None:
            config["window_size"] = scaled_windows(size)
        # Found before the model is built, so that a network that fails is known of at once.
        source, sha256 = _source(preset, weights)
        model = cls(**config)
        model.build((None, *size, model.in_channels))
        if source is None:
            return model
        report = checkpoints.load_checkpoint(
            model,
            source,
            skip_head_mismatch="num_classes" in overrides,
            skip_head=new_head,
            sha256=sha256,
            recolor="in_channels" in overrides,
        )
        if report.skipped:
            print(f"The head, of {model.num_classes} classes, starts at random.")
        if report.recolored:
            done = "summed" if model.in_channels == 1 else "repeated and scaled"
            print(f"The first kernel is {done} for images of {model.in_channels} channels.")
        return model

    # Training.

    def fit(self, x=None, y=None, *args, **kwargs):
        """Train: see `keras.Model.fit`. What Keras passes over in silence is said.

        A warning tells of images in an array that are not normalized, as it does where an array
        is evaluated, predicted or called on, and of an epoch whose loss is not a finite number.

        Raises:
            ValueError: for NaN in an array of images, and for labels in an array that are none of
                the classes of `sparse_categorical_crossentropy`, before anything is trained.
        """
        self._look_at(x, y)
        if len(args) < 4:  # callbacks are given by their name, as they mostly are
            kwargs["callbacks"] = [*keras.tree.flatten(kwargs.get("callbacks") or []), _SaysNaN()]
        return super().fit(x, y, *args, **kwargs)

    def evaluate(self, x=None, y=None, *args, **kwargs):
        self._look_at(x, y)
        return super().evaluate(x, y, *args, **kwargs)

    def _look_at(self, x, y):
        """Warn of images in an array that are not normalized; raise for labels of no class."""
        _warn_of(x, stacklevel=4)
        sparse = "sparse_categorical_crossentropy", "SparseCategoricalCrossentropy"
        loss = getattr(self, "loss", None)
        if isinstance(y, np.ndarray) and (loss in sparse or type(loss).__name__ in sparse):
            labels_within(y, self.num_classes)

    def predict(self, x, *args, **kwargs):
        _warn_of(x)
        return super().predict(x, *args, **kwargs)

    def __call__(self, images, *args, **kwargs):
        _warn_of(images)
        return super().__call__(images, *args, **kwargs)

    # Files.

    def load_weights(self, filepath, skip_mismatch=False, **kwargs):
        """Read a checkpoint, all of it or nothing. Keras's own loader can stop half-way.

        The state of a built optimizer is read too, where the file is one of Keras's that has it.

        Args:
            filepath: see `gcvit.load_checkpoint`.
            skip_mismatch: leave a head of another size as it is; default `False`.
            **kwargs: none; taken so that an unknown one gets a `TypeError` by its name.

        Raises:
            gcvit.CheckpointError: if the file is not this model's, or its optimizer's state not
                that of this model's optimizer; nothing is changed.
        """
        if kwargs:
            raise TypeError(f"GCViT.load_weights does not take {', '.join(kwargs)}.")
        plan, _ = checkpoints.plan_loading(self, filepath, skip_head_mismatch=skip_mismatch)
        if self._takes_optimizer_of(filepath):  # Keras also restores the random generators
            return super().load_weights(filepath, skip_mismatch=skip_mismatch)
        for spec, value in plan:
            spec.assign(value)

    def _takes_optimizer_of(self, path):
        """Tell whether a file has an optimizer's state for this model; raise if for another.

        An optimizer that has not trained yet takes the state where it can, and is built for it.
        """
        optimizer = getattr(self, "optimizer", None)
        stored = readers.optimizer_shapes(path) if optimizer is not None else []
        if not stored:
            return False
        fresh = not optimizer.built
        sample = optimizer.from_config(optimizer.get_config()) if fresh else optimizer
        if fresh:
            sample.build(self.trainable_variables)
        own = [tuple(variable.shape) for variable in sample.variables]
        if stored == own:
            if fresh:
                optimizer.build(self.trainable_variables)
            return True
        if fresh:
            warnings.warn(
                f"{path} holds the state of an optimizer that does not fit this model: it is left "
                "out, and the training starts anew.",
                stacklevel=3,
            )
            return False
        alike = " of other shapes" if len(stored) == len(own) else ""
        raise readers.CheckpointError(
            f"{path} holds the state of an optimizer that does not fit this model's: it has "
            f"{len(stored)} variables, this one has {len(own)}{alike}. Freeze the layers that were "
            "frozen when the file was written, or compile the model anew and read the file before "
            "it trains."
        )

    def get_build_config(self):
        """Return the shape to build for, and how layers differ from new ones, for `.keras`."""
        if not self.built:
            return None
        shape = (None, *self.built_size, self.in_channels)
        fixed = [_name_in(variable) for variable in self.weights if not variable.trainable]
        return {"input_shape": shape, "layers": self._layer_states(), "fixed": fixed}

    def _layer_states(self):
        """Return what was done to layers after they were made, {attribute path: what}."""
        states = {}
        for path, layer in self._parts():
            state = {}
            if getattr(layer, "lora_enabled", False):
                state["lora"] = [layer.lora_rank, layer.lora_alpha]
            if getattr(layer, "quantization_mode", None):
                config = keras.saving.serialize_keras_object(layer.quantization_config)
                state["quantized"] = config
            if not layer.trainable:
                state["frozen"] = True
            if state:
                states[path] = state
        return states

    def _parts(self):
        """Yield the model and each layer that can hold weights, with its path, parents first."""
        yield "", self
        for path, _, layer in checkpoints.sublayers(self):
            yield path, layer

    def build_from_config(self, config):
        self.build(config["input_shape"])
        with _garbage_frozen():
            for path, layer in self._parts():
                state = config["layers"].get(path, {})
                if "lora" in state:
                    layer.enable_lora(state["lora"][0], lora_alpha=state["lora"][1])
                if "quantized" in state:
                    how = keras.saving.deserialize_keras_object(state["quantized"])
                    layer.quantize(config=how, type_check=False)
                layer.trainable = "frozen" not in state
        for variable in self.weights:  # that of a layer would train what it adapts
            variable.trainable = _name_in(variable) not in config["fixed"]

    def save(self, filepath, *args, **kwargs):
        """Write the model: see `keras.Model.save`. The file is replaced when the new one is whole.

        Frozen layers, LoRA adapters, quantized layers and the optimizer's state are in the file
        too: a training goes on from there.

        Raises:
            ValueError: for another ending, as Keras's old `.h5`, which cannot be read back, before
                anything is written.
        """
        if kwargs.get("zipped") is not False and not os.fspath(filepath).endswith(".keras"):
            raise ValueError(
                f"A GCViT is saved as .keras, or its weights as .weights.h5; got {filepath}."
            )
        with _whole(filepath, *args, **kwargs) as target:
            super().save(target, *args, **kwargs)

    def save_weights(self, filepath, *args, **kwargs):
        """Write the weights, whole: see `keras.Model.save_weights`. LoRA adapters are merged.

        Raises:
            gcvit.CheckpointError: for a quantized model, before anything is written.
            ValueError: for another ending than `.weights.h5`, or `.weights.json` for shards.
        """
        checkpoints.weight_specs(self)
        if not os.fspath(filepath).endswith((".weights.h5", ".weights.json")):
            raise ValueError(
                f"Weights are saved as .weights.h5, or in shards as .weights.json; got {filepath}."
            )
        with _whole(filepath, *args, **kwargs) as target:
            super().save_weights(target, *args, **kwargs)

    def quantize(self, mode="int8", config=None, filters=None, type_check=False):
        """Quantize the dense layers to eight bits: see `keras.Model.quantize`.

        Weights are rounded once, a scale for each output; what comes in is rounded in each
        pass, a scale for each token. Convolutions and norms stay as they are.

        Args:
            mode: "int8", the default and the only one.
            config: a `keras.quantizers.Int8QuantizationConfig`; default: Keras's own choice.
            filters: which layers; see `keras.Model.quantize`.
            type_check: without effect: see `keras.Model.quantize`.

        Raises:
            ValueError: for another mode, a model that computes in half precision, is not built or
                is quantized already, or filters that leave nothing; nothing is changed.
        """
        if mode != "int8":
            raise ValueError(f'A GCViT is quantized by model.quantize("int8"); got {mode!r}.')
        if self.compute_dtype != "float32":
            raise ValueError(
                f"A GCViT is quantized from float32; this one computes in {self.compute_dtype}. "
                "Build it without dtype, read the weights, then quantize."
            )
        if not self.built:
            raise ValueError("Build the model before it is quantized: its weights are rounded.")
        if any(getattr(layer, "quantization_mode", None) for _, layer in self._parts()):
            raise ValueError("The model is quantized already.")
        with warnings.catch_warnings(), _garbage_frozen():
            # Keras warns of each layer that has no eight bits, two hundred in the smallest model.
            warnings.filterwarnings("ignore", message=".*quantize")
            # The layers of `fast` have the weights of Keras's own: no need to check the class.
            super().quantize(mode, config=config, filters=filters, type_check=False)
        if not any(getattr(layer, "quantization_mode", None) for _, layer in self._parts()):
            raise ValueError(f"No dense layer passes the filters {filters!r}.")

    def _check_quantize_args(self, mode, compute_dtype):
        """Leave it to `quantize`, whose sentence names the way out: Keras calls this before it."""

    # Other forms of the model.

    def build_graph(self, input_shape=None):
        """Return the model as a functional `keras.Model`, which knows every output shape.

        Args:
            input_shape: (height, width, channels); default: the size the model was built
                for, or 224 px.
        """
        return keras.Model(*self._ends(input_shape), name=self.name)

    def _ends(self, input_shape=None):
        """Return input and output as tensors of Keras, once for a shape: layers know the first."""
        size = self.built_size if self.built else (224, 224)
        shape = tuple(input_shape or (*size, self.in_channels))
        # Not by setattr: Keras would take what hangs on it for parts of the model.
        ends = vars(self).setdefault("_graph_ends", {})
        if shape not in ends:
            images = keras.Input(shape=shape)
            ends[shape] = images, self.call(images)
        return ends[shape]

    @property
    def input(self):
        """What the model takes, as in `keras.applications`: a base for a functional model."""
        return self._ends()[0]

    @property
    def output(self):
        """What the model gives for `input`."""
        return self._ends()[1]

    def __getattr__(self, name):
        # Not properties: Keras looks at all of a model's when it saves it.
        if name in ("inputs", "outputs") and self.__dict__.get("built"):
            return [self.input if name == "inputs" else self.output]
        inherited = getattr(super(), "__getattr__", None)  # PyTorch's modules have one
        if inherited is not None:
            return inherited(name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def summary(self, input_shape=None, **kwargs):
        """Print a table of the layers with output shapes and parameters.

        Args:
            input_shape: see `build_graph`.
            **kwargs: what `keras.Model.summary` takes.
        """
        return self.build_graph(input_shape).summary(**kwargs)

    def export(self, filepath, format="tf_saved_model", **kwargs):
        """Write the model for use without Keras: see `keras.Model.export`.

        ONNX is written by PyTorch's own exporter, for images of the size that the model was
        built for, in batches of any size: what Keras calls for it on TensorFlow lacks an
        operation of the exact GELU. LiteRT is written on TensorFlow, for one image at a time,
        in operations that every runtime of it has.

        Args:
            filepath: the file or folder to write.
            format: "tf_saved_model", the default, "onnx", or another that Keras knows.
            **kwargs: what `keras.Model.export` takes; for "onnx", what `torch.onnx.export` does.

        Raises:
            ValueError: for "onnx" on another backend than PyTorch or of a model that it has no
                operations for, and for "litert" of a model that takes more operations than LiteRT
                has. Nothing is written.
        """
        if format == "onnx":
            return _export_onnx(self, filepath, **kwargs)
        # Keras would take the shape of the last call, and refuse where there was none.
        shape = (None, *self.built_size, self.in_channels)
        if format == "litert":  # cannot tell -1 windows of a batch of unknown size
            shape = (1, *(side or 224 for side in self.built_size), self.in_channels)
        given = {"input_signature": [keras.InputSpec(shape=shape, dtype="float32")], **kwargs}
        if format == "litert" and keras.backend.backend() == "tensorflow":
            return _export_litert(self, super().export, filepath, **given)
        if os.path.isdir(filepath):  # a SavedModel is a folder, in which others may have files
            return super().export(filepath, format=format, **given)
        with checkpoints.replacing(filepath) as unfinished:
            return super().export(unfinished, format=format, **given)


@contextlib.contextmanager
def _garbage_frozen():
    """Spare what is there the search for garbage that Keras begins for each quantized layer."""
    free = gc.get_freeze_count() == 0  # else it is the user's
    if free:
        gc.freeze()
    try:
        yield
    finally:
        if free:
            gc.unfreeze()


def _name_in(variable):
    """Return a variable's name within its model, whose own name Keras may number anew."""
    return variable.path.partition("/")[2]


def _warn_of(images, stacklevel=3):
    """Warn of images in an array whose numbers are hardly normalized ones."""
    if isinstance(images, np.ndarray) and images.dtype.kind == "f":
        sentence = not_normalized(images[:32])
        if sentence:
            warnings.warn(sentence, stacklevel=stacklevel)


class _SaysNaN(keras.callbacks.Callback):
    """Warns of a loss that is not a finite number, unless another callback has ended the run."""

    def on_epoch_end(self, epoch, logs=None):
        loss = (logs or {}).get("loss", 0.0)
        if not np.isfinite(loss) and not self.model.stop_training:
            warnings.warn(
                f"In epoch {epoch + 1} the loss is {loss}: the training has diverged. Look at the "
                "learning rate, the labels and the images; keras.callbacks.TerminateOnNaN ends "
                "such a run.",
                stacklevel=2,
            )


def _whole(path, overwrite=True, *_, zipped=True, **__):
    """Return `weights.replacing` for a file that Keras would write in place, where it can be."""
    if not overwrite or zipped is False or "://" in os.fspath(path):
        return contextlib.nullcontext(path)
    return checkpoints.replacing(path)


def _export_onnx(model, filepath, **kwargs):
    if keras.backend.backend() != "torch":
        raise ValueError(
            "ONNX is written on PyTorch only, and the backend is "
            f"{keras.backend.backend()}. Save the weights, set KERAS_BACKEND=torch in a new "
            "process, read them and export there."
        )
    import torch

    height, width = (side or 224 for side in model.built_size)
    # Two images: a batch of one would be taken for a constant.
    images = torch.zeros((2, height, width, model.in_channels))
    kwargs = {"dynamo": True, "dynamic_shapes": (({0: torch.export.Dim("batch")},),), **kwargs}
    training = model.training
    try:
        if model.compute_dtype == "bfloat16":
            raise TypeError("ONNX has no convolutions of bfloat16")  # and would be written
        with checkpoints.replacing(filepath) as unfinished:
            torch.onnx.export(model.eval(), (images,), os.fspath(unfinished), **kwargs)
    except (ImportError, OSError):
        raise
    except Exception as error:
        raise ValueError(
            "PyTorch cannot write some part of this model as ONNX: export it in float32, before it "
            "is quantized."
        ) from error
    finally:
        model.train(training)


def _export_litert(model, export, filepath, **kwargs):
    import tensorflow as tf

    if not os.fspath(filepath).endswith(".tflite"):
        raise ValueError(f"A LiteRT file must end in .tflite; got {filepath}.")
    kwargs.setdefault("target_spec", {"supported_ops": [tf.lite.OpsSet.TFLITE_BUILTINS]})
    with checkpoints.replacing(filepath) as unfinished, _with_gelu_of_tensorflow(model):
        try:
            export(unfinished, format="litert", **kwargs)
        except OSError:
            raise
        except Exception as error:
            raise ValueError(
                "LiteRT has no operation of its own for some part of this model: export it in "
                'float32, or as format="tf_saved_model".'
            ) from error


@contextlib.contextmanager
def _with_gelu_of_tensorflow(model):
    """Let activations compute the exact GELU as LiteRT recognizes it, while a block lasts.

    Keras writes it with erfc and `fast` with erf, neither of which LiteRT has.
    """
    import tensorflow as tf

    exact = keras.activations.gelu
    having = [
        layer for layer in model._flatten_layers() if getattr(layer, "activation", None) is exact
    ]
    try:
        for layer in having:
            layer.activation = lambda x: tf.nn.gelu(x, approximate=False)
        yield
    finally:
        for layer in having:
            layer.activation = exact


def _source(preset, weights):
    """Return the file that holds a preset's weights, or `None`, and the hash it must have."""
    if weights is None or (not isinstance(weights, str) or checkpoints.looks_like_path(weights)):
        return weights, None
    listed = PRESETS[preset]["weights"]
    name = next(iter(listed)) if weights == "default" else weights
    entry = _nearest(f"weights of {preset}", name, listed)
    return checkpoints.locate(entry), entry["sha256"]


def _nearest(kind, name, known):
    if name in known:
        return known[name]
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.4) or list(known)
    raise ValueError(f"Unknown {kind}: {name!r}. Nearest: {', '.join(near) or 'none'}.")
