"""Which tokens of an image belong to which rank. Numbers only: no tensors are touched and nothing is imported.

Text, image and reference images are cut separately, so every rank has its share of each: the parts of the model
that treat them differently (two streams of blocks, two timesteps, cached references) stay balanced and need nobody
else's tokens. Shares differ by at most one token, in the sum too.
"""

from dataclasses import dataclass

from ...attention.errors import UserError


def split_evenly(length, ranks, first=0):
    """(begin, end) of each rank in a run of `length` tokens. The ranks from `first` on, modulo `ranks`, get one of the
    tokens that are left over.
    """
    base, over = divmod(length, ranks)
    sizes = [base + ((rank - first) % ranks < over) for rank in range(ranks)]
    ends = [sum(sizes[: rank + 1]) for rank in range(ranks)]
    return tuple((end - size, end) for size, end in zip(sizes, ends))


@dataclass(frozen=True)
class TokenShards:
    """text, image, references: (begin, end) of each rank, each counted from the beginning of its own kind of token.
    attended: whether the reference images are part of the sequence; False when their keys and values come from a
    cache.
    """

    text: tuple
    image: tuple
    references: tuple
    attended: bool = True

    @classmethod
    def of(cls, text, image, references, ranks, attended=True):
        """TokenShards for so many tokens of each kind. ValueError when a rank would have no share of one of them."""
        for name, length in (("text", text), ("the image", image), ("the reference images", references)):
            if 0 < length < ranks or (length == 0 and name == "the image"):
                raise UserError(
                    f"{ranks} GPUs cannot share {length} tokens of {name}: use fewer GPUs or a larger image.",
                    "several-gpus",
                )
        return cls(
            split_evenly(text, ranks),
            split_evenly(image, ranks, text % ranks),
            split_evenly(references, ranks, (text + image) % ranks),
            attended,
        )

    @property
    def ranks(self):
        return len(self.image)

    def image_lengths(self, references=None):
        """Tokens of the image stream, references included (by default: where they are attended), of each rank."""
        parts = (self.image, self.references) if self._with(references) else (self.image,)
        return tuple(sum(end - begin for begin, end in rank) for rank in zip(*parts))

    def text_lengths(self):
        return tuple(end - begin for begin, end in self.text)

    def lengths(self, references=None):
        """Tokens of each rank."""
        return tuple(map(sum, zip(self.text_lengths(), self.image_lengths(references))))

    def image_ranges(self, rank, references=None):
        """(begin, end) of a rank's tokens in the image stream of the whole model, in which the references follow the
        image.
        """
        whole = self.image[-1][1]
        here = [self.image[rank]]
        return here + [tuple(whole + at for at in self.references[rank])] if self._with(references) else here

    def order(self, references=None):
        """Positions in the whole sequence (text, image, references) of the tokens of rank 0, then of rank 1 and so
        on.
        """
        text = self.text[-1][1]
        after_text = [
            [(text + begin, text + end) for begin, end in self.image_ranges(rank, references)]
            for rank in range(self.ranks)
        ]
        return [
            at
            for own, others in zip(self.text, after_text)
            for begin, end in (own, *others)
            for at in range(begin, end)
        ]

    def _with(self, references):
        return self.attended if references is None else references
