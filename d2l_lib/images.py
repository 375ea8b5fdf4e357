"""Images as documents: one picture is one chunk, read by a vision-language context encoder.

    picture  ->  chat with an image  ->  processor  ->  token ids and pixels  ->  ContextEncoder.encode(**inputs)

The chat is that of a text chunk (see `documents`): an empty system turn where the template has one, the picture as the
user's turn, the opening of the model's turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor

from d2l_lib.documents import TemplateRefuses, check_name, checked_text, from_template, name_each

Document = str | Path | Image.Image
Documents = Document | Sequence[Document] | Mapping[str, Document]


def is_image(document: object) -> bool:
    """Whether this document is a picture (a PIL image)."""
    return isinstance(document, Image.Image)


def name_texts_and_images(documents: Documents) -> dict[str, Document]:
    """Every input of `internalize` as {name: text or RGB picture}, checked.

    As `documents.name_documents`; a picture alone is called "image", in a list it counts like a text ("document 2").
    ValueError names a picture that cannot be read.
    """
    if is_image(documents):
        documents = {"image": documents}
    has_names = isinstance(documents, Mapping)
    return {
        name: _rgb(one, check_name(name)) if is_image(one) else checked_text(one, name, has_names)
        for name, one in name_each(documents).items()
    }


def _rgb(image: Image.Image, name: str) -> Image.Image:
    """The picture in three colours, as every processor reads it."""
    try:
        return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"image {name!r} could not be read ({error}): open or copy the file again") from error


def image_inputs(processor, image: Image.Image) -> dict[str, Tensor]:
    """What the encoder of this processor reads for one picture: input_ids, attention_mask [1, T], pixel_values, ...

    ValueError where the processor has no chat template.
    """
    if not getattr(processor, "chat_template", None):
        raise ValueError(
            "this processor has no chat template, and the method reads images in chat format: use the "
            "instruction-tuned version of the model, or set processor.chat_template"
        )
    user = {"role": "user", "content": [{"type": "image", "image": image}]}
    system = {"role": "system", "content": [{"type": "text", "text": ""}]}
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    try:
        inputs = from_template(processor, [system, user], **options)
    except TemplateRefuses:  # no system turn in this template
        inputs = from_template(processor, [user], **options)
    return {name: one for name, one in inputs.items() if isinstance(one, Tensor)}
