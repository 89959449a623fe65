"""Draws small models as the text of their classes, and operations on them: what people write that is not a plain chain.

Every value is of four channels and of one size, so that anything can follow anything. A `_Writer` writes a class; what
it decides by, it also notes how to switch, so that operations change what forwards read.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from textwrap import indent
from typing import TypeVar

T = TypeVar("T")
Lines = list[str]
_CONVS = (
    "nn.Conv2d(4, 4, 1)",
    "nn.Conv2d(4, 4, 3, padding=1, bias=False)",
    "nn.Conv2d(4, 4, 3, padding=1, groups=4)",
    "nn.ConvTranspose2d(4, 4, 3, padding=1)",
    'nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")',
    "nn.LazyConv2d(4, 1)",
    "Named(4, 4, 1)",
    "nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1))",
)
_NORMS = (
    "nn.BatchNorm2d(4)",
    "nn.BatchNorm2d(4, affine=False)",
    "nn.BatchNorm2d(4, momentum=None)",
    "nn.BatchNorm2d(4, track_running_stats=False)",
    "nn.LazyBatchNorm2d()",
    "Scaled(4)",
    "nn.GroupNorm(2, 4)",
)
_ACTS = (
    "nn.ReLU()",
    "nn.ReLU(inplace=True)",
    "nn.SiLU(inplace=True)",
    "nn.Sigmoid()",
    "nn.LeakyReLU(0.2)",
    "nn.PReLU(4)",
    "nn.GELU()",
    "nn.Softsign()",
    "Flagged()",
    "nn.Identity()",
)
_SKIPS = (
    "nn.Identity()",
    "nn.Dropout(0.0)",
    "nn.Dropout(0.4)",
    "nn.Dropout2d(0.3)",
    "nn.Dropout(0.4, inplace=True)",
    "nn.MaxPool2d(3, 1, 1)",
    "nn.AvgPool2d(3, 1, 1)",
)
# What may be set in a layer, or be done to it, whatever forwards ask.
_EDITS = {
    "conv": (
        "{l}.bias = None",
        "{l}.weight = nn.Parameter({l}.weight * 2)",
        "{l}.requires_grad_(False)",
        "{l}.weight.data = {l}.weight.data * 0.5",
        "nn.utils.parametrizations.weight_norm({l})",
        'nn.utils.prune.l1_unstructured({l}, "weight", 0.3)',
        "{l}.groups = 4",
    ),
    "bn": (
        "{l}.eps = 0.1",
        "{l}.momentum = None",
        "{l}.momentum = 0.9",
        "{l}.weight = None",
        "{l}.track_running_stats = False",
        "{l}.running_mean = {l}.running_var = None",
        "{l}.requires_grad_(False)",
        "{l}.reset_running_stats()",
        "{l}.num_batches_tracked = None",
    ),
    "act": ("{l}.inplace = True", "{l}.negative_slope = 0.7", "{l}.requires_grad_(False)"),
    "skip": ("{l}.p = 0.9", "{l}.p = 0.0", "{l}.kernel_size = 1", "{l}.inplace = True"),
}
_OTHERS = {"conv": _CONVS, "bn": _NORMS, "act": _ACTS, "skip": _SKIPS}
_FUNCTIONS = (
    "F.relu({})",
    "F.relu({}, inplace=True)",
    "{}.relu()",
    "{}.sigmoid()",
    "F.leaky_relu({}, 0.3)",
    "torch.tanh({})",
    "F.silu({}, inplace=True)",
    "{}.relu_()",
    "torch.relu_({})",
    "{}.clamp(min=0)",
)
_TAKES = ("x", "x, other=None", "x, scale=1.0", "x, *, flag=False", "xs", "*xs", "x, **options")
# What a model can ask: {a condition: (what __init__ sets for it, what changes the answer)}, in {s} the module.
_FLIP = "{s}.%s = not {s}.%s"
_CONDITIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "self.flag": ("self.flag = True", (_FLIP % ("flag", "flag"),)),
    "self._flag": ("self._flag = True", (_FLIP % ("_flag", "_flag"),)),
    "self.config.flag": (
        "self.config = Config()",
        (_FLIP % ("config.flag", "config.flag"), "{s}.config = g.Config(flag=False)"),
    ),
    "self.config.inner.flag": ("self.config = Config()", (_FLIP % ("config.inner.flag", "config.inner.flag"),)),
    "self.space.flag": (
        "self.space = SimpleNamespace(flag=True)",
        (_FLIP % ("space.flag", "space.flag"), "{s}.space = SimpleNamespace(flag=False)"),
    ),
    'self.options["flag"]': (
        'self.options = {"flag": True}',
        ('{s}.options["flag"] = not {s}.options["flag"]', '{s}.options = {"flag": False}'),
    ),
    'self.options.get("more", False)': ("self.options = {}", ('{s}.options["more"] = True',)),
    '"deep" in self.names': ("self.names = []", ('{s}.names.append("deep")',)),
    "self.wide": ("", ("type({s}).wide = not type({s}).wide", "{s}.wide = not {s}.wide")),
    "type(self).wide": ("", ("type({s}).wide = not type({s}).wide",)),
    'self.mode == "deep"': ('self.mode = "deep"', ('{s}.mode = "flat"',)),
    "self.times > 1": ("self.times = 2", ("{s}.times = 3 - {s}.times",)),
    "self.rate": ("self.rate = 0.5", ("{s}.rate = 0.5 - {s}.rate",)),
    'getattr(self, "extra", False)': ("", ("{s}.extra = True",)),
    'hasattr(self, "extra")': ("", ("{s}.extra = True",)),
    "FLAG": ("", ("g.FLAG = not g.FLAG",)),
    'SETTINGS["flag"]': ("", ('g.SETTINGS["flag"] = not g.SETTINGS["flag"]',)),
    "STATE.flag": ("", ("g.STATE.flag = not g.STATE.flag",)),
    "WANTS()": ("", ("g.WANTS(not g.WANTS())",)),
    "self.wants()": ("self.wants = WANTS", ("{s}.wants(not {s}.wants())",)),
    "self.deep": ("self._deep = True", (_FLIP % ("_deep", "_deep"),)),
    "self.decides()": ("self.flag = True", (_FLIP % ("flag", "flag"),)),
    "self.training": ("", ("{s}.train(not {s}.training)",)),
    "x.shape[0] > 1": ("", ()),
    "x.mean() > 0": ("", ()),
    "x.requires_grad": ("", ()),
    "torch.is_grad_enabled()": ("", ()),
    'torch.is_autocast_enabled("cpu")': ("", ()),
    "torch.compiler.is_compiling()": ("", ()),
    "isinstance(x, torch.Tensor)": ("", ()),
    "random.random() < 0.5": ("", ()),
    "torch.rand(1).item() < 0.5": ("", ()),
    "np.random.rand() < 0.5": ("", ()),
    "RNG.random() < 0.5": ("", ()),
    "NUMPY.random() < 0.5": ("", ()),
    "torch.rand(1, generator=GENERATOR).item() < 0.5": ("", ()),
    "next(self.turns)": ("self.turns = itertools.cycle([True, False])", ()),
    "turn()": ("", ()),
    "self.calls % 2": ("self.calls = 0", ("{s}.calls += 1",)),
    "COUNT % 2": ("", ("g.COUNT += 1",)),
    "len(SEEN) % 2": ("", ("g.SEEN.append(0)",)),
}
_UNKNOWABLE = 23  # the first of those that no comparison of attributes answers
# A layer's; {l}: its name.
_OF_LAYERS: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "conv": (
        ("self.{l}.bias is not None", ("{s}.{l}.bias = None",)),
        ("self.{l}.weight.requires_grad", ("{s}.{l}.requires_grad_(not {s}.{l}.weight.requires_grad)",)),
    ),
    "bn": (
        ("self.{l}.training", ("{s}.{l}.train(not {s}.{l}.training)",)),
        ("getattr(self.{l}, 'momentum', 1) == 0.1", ("{s}.{l}.momentum = 0.3",)),
        ("getattr(self.{l}, 'num_batches_tracked', None) is not None", ()),
    ),
    "act": (
        ("isinstance(self.{l}, nn.ReLU)", ("{s}.{l} = nn.SiLU()", "{s}.{l} = nn.ReLU()")),
        ("type(self.{l}) is nn.ReLU", ("{s}._modules['{l}'] = nn.Tanh()",)),
        ("getattr(self.{l}, 'flag', False)", ("{s}.{l}.flag = False",)),
    ),
    "skip": (("self.{l}.training", ("{s}.{l}.train(not {s}.{l}.training)",)),),
}
# What a forward does besides; v: a value.
_EFFECTS: dict[str, str] = {
    "self.calls += 1": "self.calls = 0",
    "SEEN.append(1)": "",
    "SEEN.append({v}.shape)": "",
    "SEEN.append({v}.detach().clone())": "",
    "SEEN.append({v}.detach())": "",
    "self.seen.append(tuple({v}.shape))": "self.seen = []",
    "self.last = {v}.detach()": "self.last = None",
    "self.last = {v}": "self.last = None",
    'self.cache["shape"] = {v}.shape': "self.cache = {{}}",
    'print("called", tuple({v}.shape))': "",
    'print("called")': "",
    "bump()": "",
    'SETTINGS["calls"] = SETTINGS.get("calls", 0) + 1': "",
    "noted({v})": "",
    "self.flag = not self.flag": "self.flag = True",
    'setattr(self, "extra", True)': "",
    'self.__dict__["made"] = 1': "",
    "self.buffer.add_(1)": 'self.register_buffer("buffer", torch.zeros(4, 1, 1))',
    "{v}.register_hook(lambda grad: SEEN.append(grad.mean().item())) if {v}.requires_grad else None": "",
    "{v}.retain_grad() if {v}.requires_grad else None": "",
    'warnings.warn("called") if COUNT < 0 else SEEN.append("no warning")': "",
    "torch.manual_seed(3)": "",
    "functools.reduce(lambda a, b: SEEN.append(b), [1, 2], 0)": "",
    "[SEEN.append(i) for i in range(2)]": "",
    "self.train(self.training)": "",
    "bool(({v} > 0).any())": "",
    "str({v})": "",
    "assert {v}.dim() == 4": "",
}
_CONTEXTS = (
    "torch.no_grad()",
    "torch.enable_grad()",
    "torch.set_grad_enabled(self.training)",
    'torch.autocast("cpu", enabled=False)',
    'inside("a context")',
    "contextlib.nullcontext()",
    'torch.autograd.profiler.record_function("part")',
    "torch.random.fork_rng()",
)
_EVERYWHERE = (
    "m.eval()",
    "m.train()",
    "m = copy.deepcopy(m)",
    "m = pickle.loads(pickle.dumps(m))",
    "m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()})",
    "m.load_state_dict({k: v * 1.5 for k, v in m.state_dict().items()}, assign=True)",
    "m.load_state_dict(loaded(m.state_dict()))",
    "m = loaded(m)",
    "m = copy.copy(m)",
    "convert(m)",
    "revert(m)",
    "convert(m, fuse=False)",
    "report(m)",
    "unhook()",
    "m.requires_grad_(False)",
    "m.requires_grad_(True)",
    "m.to(memory_format=torch.channels_last)",
    "m.apply(lambda module: module.train())",
)
_RUNS = (
    "step({})",
    "infer({})",
    "half({})",
    "forward({})",
    "functional({})",
    'with torch.autocast("cpu"): infer({})',
    "with torch.inference_mode(): infer({})",
    "step(x.to(memory_format=torch.channels_last))",
    "step(x[:1])",
    "infer(x[0])",
    "forward(x.expand(2, 4, 4, 5).transpose(2, 3))",
)
_HOOKS = ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook")


@dataclass
class Case:
    """A model's source and what is done to it; its repr is a test."""

    source: str
    operations: list[str]

    def __repr__(self) -> str:
        operations = "".join(f"    {operation!r},\n" for operation in self.operations)
        return f"check('''\n{self.source}''', [\n{operations}])"


@dataclass
class Part:
    """A class: its text, how it is called, and what operations can do to an instance ({s})."""

    name: str
    text: str
    takes: str
    gives: str
    switches: list[str]
    layers: dict[str, list[str]]
    children: "list[tuple[str, Part]]"

    def instances(self, path: str) -> "list[tuple[str, Part]]":
        """Itself and the parts below, by the expressions that lead to them."""
        below = [found for name, child in self.children for found in child.instances(f"{path}.{name}")]
        return [(path, self), *below]


def case(seed: int) -> Case:
    draw = Random(seed)
    parts: list[Part] = []
    wild = draw.randint(0, 99) >= 70
    for number in range(draw.randint(0, 2)):
        parts.append(_Writer(draw, f"Part{number}", parts, wild).part())
    net = _Writer(draw, "Net", parts, wild).part()
    used = {part.name for _, part in net.instances("m")} | {
        base.name for base in parts for part in [*parts, net] if f"({base.name})" in part.text
    }
    text = "\n\n".join(part.text for part in [*parts, net] if part.name in used or part is net)
    return Case(text, _operations(draw, net))


def _operations(draw: Random, net: Part) -> list[str]:
    instances = net.instances("m")
    calls = [call.format(v="x", w="y") for call in _CALLS[net.takes]]
    switches = [switch.replace("{s}", path) for path, part in instances for switch in part.switches]
    layers = [
        (f"{path}.{name}", kind)
        for path, part in instances
        for kind, names in part.layers.items()
        for name in names
        if path
    ]
    anything = [*(path for path, _ in instances), *(layer for layer, _ in layers)]

    def choice(options: Sequence[T]) -> T:
        return draw.choice(options)

    def run() -> str:
        return choice(_RUNS[:3]).format(choice(calls)) if draw.randint(0, 3) < 3 else choice(_RUNS).format(calls[0])

    def change() -> str:
        kind = draw.randint(0, 9)
        if kind < 6 and switches and draw.randint(0, 9) < 9:
            return choice(switches)
        if kind == 5 and layers:
            layer, other = choice(layers)
            owner, _, name = layer.rpartition(".")
            new = choice([*_OTHERS[other], "nn.Identity()", "None"])
            new = f"g.{new}" if new[0].isupper() and new != "None" else new
            replaced = f"{layer} = {new}", f"{owner}.add_module({name!r}, {new})", f"del {layer}"
            return choice([*replaced[:2], choice(_EDITS[other]).replace("{l}", layer), choice(replaced)])
        if kind == 6:
            return f"hook({choice(anything)}, {choice(_HOOKS)!r}, {choice([False, True])})"
        if kind == 7:
            path, part = choice(instances)
            if "def helper" in part.text and draw.randint(0, 1):
                return f'patch({choice([f"g.{part.name}", path])}, "helper")'
            if "conv_norm" in part.text and draw.randint(0, 1):
                return 'patch(g, "conv_norm")'
            owners = [f"g.{part.name}", path, choice(["nn.ReLU", "nn.BatchNorm2d", "nn.Conv2d"])]
            return f"patch({choice(owners)})"
        if kind == 8:
            return f"{choice(anything)}.train({choice([False, True])})"
        return choice(_EVERYWHERE)

    before = [change()] if draw.randint(0, 9) == 9 else []
    operations = [*before, "convert(m)", run()]
    for _ in range(draw.randint(0, 4)):
        operations += [choice(_EVERYWHERE) if draw.randint(0, 3) == 3 else change(), run()]
    return operations


# A module's signature -> what it can be called with.
_CALLS = {
    "x": ("{v}", "x={v}"),
    "x, other=None": ("{v}", "{v}, {w}", "{v}, other={w}", "{v}, None"),
    "x, scale=1.0": ("{v}", "{v}, 0.5", "{v}, scale=2"),
    "x, *, flag=False": ("{v}", "{v}, flag=True"),
    "xs": ("[{v}, {w}]", "({v},)"),
    "*xs": ("{v}", "{v}, {w}"),
    "x, **options": ("{v}", "{v}, other={w}"),
}


@dataclass
class _Writer:
    """The source of one class. ``wild``: it may do what leaves it unfused."""

    draw: Random
    name: str
    parts: list[Part]
    wild: bool
    base: str = "nn.Module"
    level: Lines = field(default_factory=list)
    init: Lines = field(default_factory=list)
    methods: Lines = field(default_factory=list)
    switches: Lines = field(default_factory=list)
    layers: dict[str, list[str]] = field(default_factory=dict)
    children: "list[tuple[str, Part]]" = field(default_factory=list)
    variables: Lines = field(default_factory=lambda: ["x"])
    new: Lines = field(default_factory=list)  # variables that the statement at hand sets
    takes: str = "x"
    gives: str = "{v}"

    def part(self) -> Part:
        if self.chance(30):
            self.takes = self.choice(_TAKES)
        if self.chance(10):
            self.gives = self.choice(["({v}, {w})", '{{"out": {v}}}', "[{v}]"])
        bases = [part for part in self.parts if part.takes == "x" and part.gives == "{v}"]
        body = {"xs": ["x = xs[0]"], "*xs": ["x = sum(xs)"]}.get(self.takes, [])
        if bases and self.chance(10):
            base = self.choice(bases)
            self.base = base.name
            self.layers = {kind: list(names) for kind, names in base.layers.items()}
            self.children, self.switches = list(base.children), list(base.switches)
            body.append("x = super().forward(x)")
        body += self._argument()
        for _ in range(self.draw.randint(1, 3)):
            body += self._statement(0)
        body.append(f"return {self._result()}")
        decorator = self.choice(["@counted", "@scaled"]) if self.wild and self.chance(5) else None
        text = [f"class {self.name}({self.base}):", *(f"    {line}" for line in self.level)]
        text += [
            "    def __init__(self):",
            "        super().__init__()",
            *(f"        {line}" for line in self.init),
            "",
        ]
        text += [f"    {line}" for line in self.methods]
        text += [f"    {decorator}"] if decorator else []
        text += [f"    def forward(self, {self.takes}):", indent("\n".join(body), " " * 8), ""]
        if decorator == "@scaled":
            self.switches.append("g.FLAG = not g.FLAG")
        return Part(self.name, "\n".join(text), self.takes, self.gives, self.switches, self.layers, list(self.children))

    # Draws

    def choice(self, options: Sequence[T]) -> T:
        return self.draw.choice(options)

    def chance(self, percent: int) -> bool:
        return self.draw.randint(0, 99) >= 100 - percent

    # Statements, each some lines that leave every variable a tensor

    def _statement(self, depth: int) -> Lines:
        kinds: list[Callable[[int], Lines]] = [self._chain] * 9 + [self._layer, self._sum, self._call, self._loop]
        kinds += [self._write, self._container, self._call]
        if depth < 2:
            kinds += [self._branch] * 4 + [self._choice_of_act]
            if self.wild:
                kinds += [self._effect] * 2 + [self._context, self._odd]
        lines = self.choice(kinds)(depth)
        if depth == 0:
            self.variables += self.new
            self.new.clear()
        return lines

    def _chain(self, depth: int) -> Lines:
        """Convolution, batch norm, activation and sum in one line or several, with parts left out."""
        lines: Lines = []
        value, target = self._variable(), self._target(depth)

        def cut(expression: str, percent: int = 30) -> str:
            if not self.chance(percent):
                return expression
            name = self._target(depth)
            lines.append(f"{name} = {expression}")
            if self.chance(15):
                lines.extend(self._write(depth))
            return name

        def add(expression: str) -> str:
            other = self._variable()
            form = self.choice(["{} + {}", "{1} + {0}", "torch.add({}, {})", "{}.add_({})", "+="])
            if form != "+=":
                return form.format(expression if expression.isidentifier() else f"({expression})", other)
            name = cut(expression, 100)
            lines.append(f"{name} += {other}")
            return name

        value = cut(self._layer_of("conv", value))
        if self.chance(8):
            value = cut(self._layer_of("skip", value))
        if not self.chance(5):
            value = cut(self._layer_of("bn", value))
        if self.chance(8):
            value = cut(self._layer_of("skip", value))
        if self.chance(25):
            value = cut(add(value))
        if self.chance(65):
            value = self._act(value)
            if self.chance(15):
                value = add(cut(value))
        if value != target:
            lines.append(f"{target} = {value}")
        return lines

    def _layer(self, depth: int) -> Lines:
        kind = self.choice(["bn", "conv", "act", "skip"])
        return [f"{self._target(depth)} = {self._layer_of(kind, self._variable())}"]

    def _sum(self, depth: int) -> Lines:
        a, b = self._variable(), self._variable()
        forms = ["{t} = {a} + {b}", "{a} += {b}", "{a} = {a} * 0.5 + {b}", "{t} = torch.add({a}, {b}, alpha=2)"]
        forms += ["{t} = sum([{a}, {b}])", "{t} = torch.cat([{a}, {b}], 1)[:, 2:6]", "{t} = {a}"]
        form = self.choice(forms)
        return [form.format(t=self._target(depth) if "{t}" in form else "", a=a, b=b)]

    def _write(self, depth: int) -> Lines:
        forms = ["{v}.mul_(0.5)", "{v} = F.relu_({v})", "{v}[:, 0] = 1.0", "{v} += 1", "{v}.data.mul_(0.5)"]
        return [self.choice(forms).format(v=self._variable())]

    def _call(self, depth: int) -> Lines:
        """A call of a part, a helper or a method."""
        value, target = self._variable(), self._target(depth)
        if self.parts and not self.chance(15):
            return [f"{target} = {self._called(value)}"]
        forms = [
            "conv_norm(self.{conv}, self.{bn}, {v})",
            "self.helper({v})",
            "(lambda t: self.{bn}(self.{conv}(t)))({v})",
        ]
        if self.wild:
            forms += ["checkpoint(self.helper, {v}, use_reentrant=False)", "noted(self.{bn}(self.{conv}({v})))"]
            forms += [
                "F.conv2d({v}, self.{own}.weight, self.{own}.bias)",
                "self.{bn}.forward(self.{conv}.forward({v}))",
            ]
            forms += ["self.helpers[0](self.helpers[1]({v}))"]
        form = self.choice(forms)
        conv, norm = self._name("conv"), self._name("bn")
        if "self.helper" in form and "helpers" not in form and "def helper(self, x):" not in self.methods:
            body = f"self.{norm}(self.{conv}(x))"
            body = f"F.relu({body})" if self.chance(50) else body
            decorator = ["@torch.no_grad()"] if self.wild and self.chance(10) else []
            self.methods += [*decorator, "def helper(self, x):", f"    return {body}", ""]
        if "helpers" in form:
            self._set(f"self.helpers = [self.{norm}, self.{conv}]")
        if "{own}" in form:
            self._set("self.own = nn.Conv2d(4, 4, 1)")
        return [f"{target} = {form.format(v=value, conv=conv, bn=norm, own='own')}"]

    def _called(self, value: str) -> str:
        part = self.choice(self.parts)
        known = [name for name, child in self.children if child is part]
        if known and self.chance(40):
            name = self.choice(known)
        else:
            name = f"part{len(self.children)}"
            if known and self.chance(10):
                self._set(f"self.{name} = self.{known[0]}")
            else:
                self._set(f"self.{name} = {part.name}()")
            self.children.append((name, part))
        other = self._variable()
        call = f"self.{name}({self.choice(_CALLS[part.takes]).format(v=value, w=other)})"
        if part.gives == "{v}":
            return call
        return f'{call}["out"]' if "out" in part.gives else self.choice([f"{call}[0]", f"sum({call})"])

    def _loop(self, depth: int) -> Lines:
        value = self._variable()
        index = len([line for line in self.init if "ModuleList" in line or "ModuleDict" in line])
        kind = self.draw.randint(0, 4)
        if kind == 0:
            self._set("self.times = 2")
            self._switch("{s}.times = 3 - {s}.times", "{s}.times = 0")
            return ["for _ in range(self.times):", *self._nested(depth)]
        conv, norm, act = self.choice(_CONVS[:3]), self.choice(_NORMS[:4]), self.choice(_ACTS)
        if kind == 1:
            self._set(f"self.convs{index} = nn.ModuleList([{conv}, {conv}])")
            self._set(f"self.norms{index} = nn.ModuleList([{norm}, {norm}])")
            self._switch(f"{{s}}.norms{index}[1] = nn.Identity()", f"{{s}}.convs{index}[0] = {_CONVS[0]}")
            return [
                f"for conv, norm in zip(self.convs{index}, self.norms{index}):",
                f"    {value} = {self._function(f'norm(conv({value}))')}",
            ]
        if kind == 2:
            self._set(f'self.table{index} = nn.ModuleDict({{"conv": {conv}, "bn": {norm}, "act": {act}}})')
            self._switch(f'{{s}}.table{index}["act"] = nn.SiLU()', f'{{s}}.table{index}["more"] = nn.Sigmoid()')
            if self.chance(30):
                self._set('self.order = ["conv", "bn", "act"]')
                self._switch("{s}.order.reverse()", '{s}.order = ["conv", "act"]')
                return ["for name in self.order:", f"    {value} = self.table{index}[name]({value})"]
            return [f"for layer in self.table{index}.values():", f"    {value} = layer({value})"]
        listed = "list" if kind == 4 and self.wild else "nn.ModuleList"
        self._set(f"self.layers{index} = {listed}([{conv}, {norm}, {act}])  # ModuleList")
        self._switch(f"{{s}}.layers{index}.append(nn.Sigmoid())", f"{{s}}.layers{index}[2] = nn.Tanh()")
        if self.chance(30):
            return [
                f"for i, layer in enumerate(self.layers{index}):",
                f"    {value} = layer({value})",
                f"    if i == len(self.layers{index}) - 1:",
                f"        {value} = {value} * 2",
            ]
        return [f"for layer in self.layers{index}:", f"    {value} = layer({value})"]

    def _container(self, depth: int) -> Lines:
        value, target = self._variable(), self._target(depth)
        name = f"block{len(self.children) + len(self.init)}"
        layers = [self.choice(_CONVS[:5]), self.choice(_NORMS), self.choice(_ACTS)]
        self._set(f"self.{name} = nn.Sequential({', '.join(layers)})")
        self._switch(f"{{s}}.{name}.append(nn.Sigmoid())", f"{{s}}.{name}[2] = nn.Tanh()", f"{{s}}.{name}[1].eval()")
        self._switch(f"{{s}}.{name} = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))")
        self._switch(f"{{s}}.{name} = {{s}}.{name}[:2]")
        forms = ["self.{n}({v})", "self.{n}({v}) + {w}", "self.{n}[2](self.{n}[1](self.{n}[0]({v})))"]
        forms += ["self.{n}[:2]({v})", "F.relu({w} + self.{n}({v}))"]
        return [f"{target} = {self.choice(forms).format(n=name, v=value, w=self._variable())}"]

    def _branch(self, depth: int) -> Lines:
        lines = [f"if {self._condition()}:", *self._nested(depth)]
        if self.chance(40):
            lines += ["else:", *self._nested(depth)]
        elif self.chance(15):
            lines.append(f"    return {self._result()}")
        return lines

    def _nested(self, depth: int) -> Lines:
        return [f"    {line}" for line in self._statement(depth + 1)]

    def _choice_of_act(self, depth: int) -> Lines:
        value = self._variable()
        inner = self._layer_of("bn", self._layer_of("conv", value))
        forms = {
            "getattr(F, self.kind)({})": ('self.kind = "relu"', '{s}.kind = "silu"'),
            '{{"relu": F.relu, "silu": F.silu}}[self.kind]({})': ('self.kind = "relu"', '{s}.kind = "silu"'),
            "getattr(F, KIND)({})": ("", 'g.KIND = "silu"'),
            "ACT({})": ("", "g.ACT = F.silu"),
            "self.function({})": ("self.function = F.relu", "{s}.function = F.silu"),
            "self.function({}) if callable(self.function) else {}": ("self.function = F.relu", "{s}.function = F.silu"),
            "F.relu({}) if self.config.flag else F.silu({})": ("self.config = Config()", "{s}.config.flag = False"),
            "F.leaky_relu({}, self.slope)": ("self.slope = 0.1", "{s}.slope = 0.4"),
            "{} * self.scale": ("self.scale = 1.0", "{s}.scale = 2.0"),
            "getattr(self, self.chosen)({})": ('self.chosen = "first"', '{s}.chosen = "second"'),
        }
        form = self.choice(list(forms))
        sets, switch = forms[form]
        self._set(sets)
        self._switch(switch)
        if "chosen" in form:
            self._set("self.first, self.second = nn.ReLU(), nn.SiLU()")
        return [f"{value} = {form.format(*[inner] * 2)}"]

    def _effect(self, depth: int) -> Lines:
        effect = self.choice(list(_EFFECTS))
        self._set(_EFFECTS[effect].replace("{{", "{").replace("}}", "}"))
        return [effect.replace("{v}", self._variable())]

    def _context(self, depth: int) -> Lines:
        return [f"with {self.choice(_CONTEXTS)}:", *self._nested(depth)]

    def _odd(self, depth: int) -> Lines:
        value = self._variable()
        norm = self._name("bn")
        conv = self._name("conv")
        forms = [
            ["try:", *self._nested(depth), "finally:", '    SEEN.append("finally")'],
            [f"self.{norm}.eval()"],
            [f"{value} = {value} + self.{norm}.weight.view(1, -1, 1, 1)"],
            [
                f"before = self.{norm}.running_mean.clone()",
                f"{value} = self.{norm}(self.{conv}({value})) - before.view(1, -1, 1, 1)",
            ],
            [f"if {value}.dim() != 4:", f'    raise ValueError("not {value}")'],
            [f"{value} = {value} * self.{conv}.weight.mean()"],
            [f"{value} = [self.{norm}(self.{conv}(v)) for v in [{value}]][0]"],
            [f"{value} = functools.reduce(lambda v, f: f(v), [self.{conv}, self.{norm}], {value})"],
            [f"before, {value} = {value}, self.{norm}(self.{conv}({value}))", f"{value} = {value} + before"],
        ]
        return self.choice(forms)

    # Expressions

    def _condition(self) -> str:
        number = self.draw.randint(0, 9)
        if number >= 7 and self.layers:
            kind = self.choice(sorted(self.layers))
            condition, switches = self.choice(_OF_LAYERS[kind])
            layer = self.choice(self.layers[kind])
            self._switch(*(switch.replace("{l}", layer) for switch in switches))
            return condition.replace("{l}", layer)
        if number == 6 and self.children:
            name, child = self.choice(self.children)
            if "self.flag = True" in child.text:
                self._switch(f"{{s}}.{name}.flag = not {{s}}.{name}.flag")
                return f"self.{name}.flag"
            return f"self.{name}.training"
        if number == 5:
            self._set(f"self.down = {self.choice(['None', 'nn.Conv2d(4, 4, 1)'])}")
            self._switch("{s}.down = None", "{s}.down = nn.Conv2d(4, 4, 1)")
            return "self.down is not None"
        known = list(_CONDITIONS)
        if not (self.wild and self.chance(30)):
            known = known[:_UNKNOWABLE]
        condition = self.choice(known)
        sets, switches = _CONDITIONS[condition]
        self._set(sets)
        self._switch(*switches)
        if "wide" in condition and "wide = True" not in self.level:
            self.level.append("wide = True")
        method = {"self.deep": ["@property", "def deep(self):", "    return self._deep", ""]}.get(condition)
        method = ["def decides(self):", "    return self.flag", ""] if "decides" in condition else method
        if method and method[-2] not in self.methods:
            self.methods += method
        return f"not {condition}" if self.chance(20) else condition

    def _argument(self) -> Lines:
        """What is done with the arguments behind the first."""
        return {
            "x, other=None": ["if other is not None:", "    x = x + other"],
            "x, scale=1.0": ["x = x * scale"],
            "x, *, flag=False": ["if flag:", "    x = F.relu(x)"],
            "x, **options": ['x = x + options.get("other", 0)'],
        }.get(self.takes, [])

    def _result(self) -> str:
        return self.gives.format(v=self._variable(), w=self._variable())

    def _act(self, value: str) -> str:
        return self._layer_of("act", value) if self.chance(60) else self._function(value)

    def _function(self, value: str) -> str:
        return self.choice(_FUNCTIONS).format(value)

    def _layer_of(self, kind: str, value: str) -> str:
        name = self._name(kind)
        if not self.wild or not self.chance(8):
            return f"self.{name}({value})"
        forms = ["self.{n}(input={v})", 'getattr(self, "{n}")({v})', 'self._modules["{n}"]({v})']
        forms += ['self.get_submodule("{n}")({v})', "self.{n}.forward({v})", "self.{n}.__call__({v})"]
        return self.choice(forms).format(n=name, v=value)

    def _name(self, kind: str) -> str:
        """A call of a layer, mostly a new one."""
        known = self.layers.setdefault(kind, [])
        if not known or not self.chance(15):
            options = _OTHERS[kind]
            # Those that fuse come first.
            usual = {"conv": options[:6], "bn": options[:5]}.get(kind, options)
            new = (
                self.choice(usual if not self.chance(10) else options) if self.chance(40) else self.choice(options[:2])
            )
            known.append(f"{kind}{sum(map(len, self.layers.values()))}")
            self._set(f"self.{known[-1]} = {new}")
            return known[-1]
        return self.choice(known)

    def _variable(self) -> str:
        return self.choice(self.variables[::-1])

    def _target(self, depth: int) -> str:
        if depth or not self.chance(30):
            return self._variable()
        self.new.append(f"y{len(self.variables) + len(self.new)}")
        return self.new[-1]

    def _set(self, line: str) -> None:
        if line and line not in self.init:
            self.init.append(line)

    def _switch(self, *switches: str) -> None:
        self.switches += [switch for switch in switches if switch not in self.switches]
