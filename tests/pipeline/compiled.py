"""A compiled pipeline, with its graphs inside graphs laid flat."""

from collections.abc import Iterator
from typing import Any


class Graphs:
    """The first document of a compiled pipeline.

    A task is known by its name alone: the pipeline has each of them once. ``graph_of`` says which graph it is in, by
    the task that stands for that graph, or "root".
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        self.spec = spec
        self.content: dict[str, dict[str, Any]] = {"root": spec["root"]}
        self.tasks: dict[str, dict[str, Any]] = {}
        self.graph_of: dict[str, str] = {}
        for graph, name, task in self._walk("root", spec["root"]["dag"]):
            assert name not in self.tasks
            self.tasks[name], self.graph_of[name] = task, graph

    def _walk(self, graph: str, dag: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
        for name, task in dag["tasks"].items():
            component = self.spec["components"][task["componentRef"]["name"]]
            yield graph, name, task
            if "dag" in component:
                self.content[name] = component
                yield from self._walk(name, component["dag"])

    @property
    def leaves(self) -> dict[str, dict[str, Any]]:
        """The tasks that run something."""
        return {name: task for name, task in self.tasks.items() if name not in self.content}

    @property
    def loop(self) -> str:
        """The task that stands for the loop over the jobs."""
        (loop,) = [name for name, task in self.tasks.items() if "parameterIterator" in task]
        return loop

    def inside(self, name: str, graph: str) -> bool:
        """Whether a task is in a graph, or in one inside it."""
        while name != "root":
            name = self.graph_of[name]
            if name == graph:
                return True
        return False

    def origin(self, name: str, source: dict[str, Any], kind: str) -> tuple[str, str]:
        """Follows an input of a task through the borders of graphs: (task, output), or ("root", pipeline parameter).

        Args:
            name: the task.
            source: its input, as the compiled file has it.
            kind: "Parameter" or "Artifact".
        """
        graph = self.graph_of[name]
        outer = source.get(f"componentInput{kind}")
        if outer is not None:
            if graph == "root":
                return "root", outer
            inputs = self.tasks[graph]["inputs"].get(f"{kind.lower()}s", {})
            if outer in inputs:
                return self.origin(graph, inputs[outer], kind)
            return graph, outer  # the loop's own item
        reference = source[f"taskOutput{kind}"]
        task, key = reference["producerTask"], reference[f"output{kind}Key"]
        while task in self.content:
            outputs = self.content[task]["dag"]["outputs"][f"{kind.lower()}s"][key]
            (inner,) = outputs[f"{kind.lower()}Selectors"]
            task, key = inner["producerSubtask"], inner[f"output{kind}Key"]
        return task, key
