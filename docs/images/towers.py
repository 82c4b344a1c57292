"""Pictures of what a method of two towers uses."""

from __future__ import annotations

from picture import Picture, spread, width_of

TOWER_PLACES = {  # place -> what a picture shows there; its words go into the box
    "words": "the box where texts enter, with its own words",
    "*.tokens": "a box on the stream behind the embedding",
    "*.lower": "a box on the inner side of the lower blocks",
    "*.upper": "a box beside the upper blocks, from before them to a sum behind",
    "*.weights": "a box on the inner side of either blocks",
    "*.output": "a box on the features",
    "shared": "a box between the two of `*.upper`",
    "couples": "words at an arrow from what the text tower has to the image tower's, lower and tokens",
    "meta": "a box that reads the image features and leads to the words",
    "logits": "a box behind the cosines",
    "loss": "a box that reads the logits",
    "note": "words in the legend",
}
TOWERS = ("text", "image")


class TowersPicture(Picture):
    """Two towers from left to right, texts above and images below, and their cosines."""

    rows = {"text": 50.0, "image": 222.0}
    middle = 136.0

    def __init__(self, title: str, places: dict[str, str]):
        super().__init__(806, 300, title)
        self.places = spread(places, TOWER_PLACES, TOWERS)

    def used(self, place: str, x: float, y: float, height: float = 26) -> tuple[float, float]:
        """A box centred there, with the words of the place; (its left, its right)."""
        width = width_of(self.places[place])
        self.box(x - width / 2, y - height / 2, width, height, self.places[place], "used", "small")
        return x - width / 2, x + width / 2

    def inner(self, tower: str, distance: float) -> float:
        """The height so far from a tower's stream towards the other tower."""
        return self.rows[tower] + (distance if tower == "text" else -distance)

    def tower(self, name: str) -> None:
        y, places = self.rows[name], self.places
        self.text(16, y + 5, name, "title", "start")
        self.line((66, y), (82, y))
        words, look = ("a photo of\na {name}.", "frozen") if name == "text" else ("patch\nembedding", "frozen")
        if name == "text" and "words" in places:
            words, look = places["words"], "used"
        self.box(82, y - 21, 110, 42, words, look, "small")
        x = 192.0
        if f"{name}.tokens" in places:
            left, right = self.used(f"{name}.tokens", 252, y, 30)
            self.line((x, y), (left, y), look="line stream")
            x = right
        self.line((x, y), (314, y), look="line stream")
        self.box(314, y - 21, 92, 42, "lower blocks", "frozen", "small")
        self.line((406, y), (446, y), look="line stream")
        self.box(446, y - 21, 92, 42, "upper blocks", "frozen", "small")
        for blocks, at in (("lower", 360), ("upper", 492)):
            if f"{name}.weights" in places:
                self.used(f"{name}.weights", at, self.inner(name, 48))
                self.line((at, self.inner(name, 35)), (at, self.inner(name, 22)))
            elif blocks == "lower" and f"{name}.lower" in places:
                self.used(f"{name}.lower", at, self.inner(name, 48))
                self.line((at, self.inner(name, 35)), (at, self.inner(name, 22)))
        x = 538.0
        if f"{name}.upper" in places:
            beside = self.inner(name, 44)
            left, right = self.used(f"{name}.upper", 492, beside)
            self.dot(426, y)
            self.line((426, y), (426, beside), (left, beside))
            self.line((right, beside), (562, beside), (562, self.inner(name, 10)))
            self.line((x, y), (553, y), look="line stream", tip=False)
            self.sum(562, y)
            x = 571.0
        if f"{name}.output" in places:
            left, right = self.used(f"{name}.output", 622, y, 30)
            self.line((x, y), (left, y), look="line stream")
            x = right
        self.line((x, y), (688, y), (688, self.middle - (18 if name == "text" else -18)), look="line stream")

    def draw(self) -> None:
        places, middle = self.places, self.middle
        for name in TOWERS:
            self.tower(name)
        self.box(658, middle - 18, 60, 36, "cosines", "frozen", "small")
        x = 718.0
        if "logits" in places:
            left, right = self.used("logits", x + 20 + width_of(places["logits"]) / 2, middle, 30)
            self.line((x, middle), (left, middle), look="line stream")
            x = right
        self.line((x, middle), (x + 22, middle), look="line stream")
        self.text(x + 27, middle + 5, "logits", "title", "start")
        self.width = int(max(self.width, x + 86))
        if "loss" in places:
            self.used("loss", 600, middle)
            self.line((600 + width_of(places["loss"]) / 2, middle), (656, middle), tip=False)
        if "shared" in places:
            self.used("shared", 492, middle)
            for name in TOWERS:
                self.line((492, middle - (13 if name == "text" else -13)), (492, self.inner(name, 57)))
        if "couples" in places:
            self.line((137, self.rows["text"] + 21), (137, middle), (252, middle), (252, self.rows["image"] - 15))
            self.line((360, self.inner("text", 61)), (360, self.inner("image", 61)))
            for at in (258, 366):
                self.text(at, middle + 18, places["couples"], "small faint", "start")
        if "meta" in places:
            y = self.rows["image"]
            self.dot(600, y)
            left, right = self.used("meta", 366, middle)
            self.line((600, y), (600, middle), (right, middle))
            self.line((left, middle), (137, middle), (137, self.rows["text"] + 21))
        self.legend(268, self.places.get("note", ""))
