package cluster

import (
	"slices"
	"testing"
)

// gangPlan places two members of a gang and one allocation of another group, each on a node of its own.
func gangPlan(t *testing.T) (*harness, *Plan, []*Node) {
	h := newHarness(t)
	var nodes []*Node
	for _, id := range []string{"00000001", "00000002", "00000003"} {
		n := testNode(id)
		h.must(&RegisterNode{Node: n})
		nodes = append(nodes, n)
	}
	j := testJob("a", 2)
	j.TaskGroups[0].Gang = &Gang{Topology: []string{"${meta.rack}"}}
	h.must(&RegisterJob{Job: j, EvalID: "e"})
	own, job := h.Snapshot().Eval(nil, "e"), h.Snapshot().Job(nil, JobKey{DefaultNamespace, "a"})
	p := &Plan{EvalID: "e", EvalEpoch: own.ModifyIndex, Namespace: DefaultNamespace, JobID: "a", JobVersion: job.Version, Gangs: []string{job.TaskGroups[0].Name}}
	for i, n := range nodes {
		a := testAlloc(h, own, job, n)
		if a.ID += string(rune('a' + i)); i == 2 {
			a.TaskGroup = "alone"
		}
		p.Place = append(p.Place, a)
	}
	return h, p, nodes
}

// TestGangIsRefusedWhole: one node that refuses is enough; what is of no gang is placed.
func TestGangIsRefusedWhole(t *testing.T) {
	h, p, nodes := gangPlan(t)
	p.Place[1].NodeID = "no-such-node"
	res := h.must(&ApplyPlans{Plans: []*Plan{p}})
	got := res.Plans[0]
	if got.Stale || !slices.Contains(got.Refused, nodes[0].ID) || slices.Contains(got.Refused, nodes[2].ID) {
		t.Errorf("refused %+v", got)
	}
	for i, a := range p.Place {
		if there := h.Snapshot().Alloc(nil, a.ID) != nil; there != (i == 2) {
			t.Errorf("member %d is there: %v", i, there)
		}
	}
}

// TestPreemptionIsWhole: a plan that preempts is stale once something of that has ended, and is
// refused as a whole; what is preempted stays so, whatever another plan says of it.
func TestPreemptionIsWhole(t *testing.T) {
	h, p, nodes := gangPlan(t)
	h.must(&ApplyPlans{Plans: []*Plan{p}})
	victim := p.Place[0].ID
	h.must(&RegisterJob{Job: testJob("b", 1), EvalID: "f"})
	plan := func(eval string) *Plan {
		e := h.Snapshot().Eval(nil, eval)
		return &Plan{EvalID: eval, EvalEpoch: e.ModifyIndex, Namespace: DefaultNamespace, JobID: "b", Stop: []*AllocStop{{
			AllocID: victim, DesiredStatus: AllocDesiredEvict, DesiredDescription: "Preempted by alloc ID x", PreemptedBy: "x",
		}}}
	}
	refused := plan("f")
	refused.Place = []*Allocation{testAlloc(h, h.Snapshot().Eval(nil, "f"), h.Snapshot().Job(nil, JobKey{DefaultNamespace, "b"}), nodes[1])}
	refused.Place[0].NodeID = "no-such-node"
	h.must(&ApplyPlans{Plans: []*Plan{refused}})
	if a := h.Snapshot().Alloc(nil, victim); a.ServerTerminal() {
		t.Fatal("preempted by a plan that was refused")
	}
	h.must(&ApplyPlans{Plans: []*Plan{plan("f")}})
	a := h.Snapshot().Alloc(nil, victim)
	if a.DesiredStatus != AllocDesiredEvict || a.PreemptedByAllocation != "x" || !a.Occupies() {
		t.Errorf("preempted: %+v", a)
	}
	found := false
	for _, e := range h.Snapshot().OpenEvals(nil) {
		found = found || e.JobID == "a" && e.TriggeredBy == TriggerPreemption
	}
	if !found {
		t.Error("its job is not evaluated")
	}
	if res := h.must(&ApplyPlans{Plans: []*Plan{plan("f")}}); !res.Plans[0].Stale {
		t.Error("it is preempted twice")
	}
	again := *a.Whole()
	again.DesiredStatus, again.DesiredDescription, again.PreemptedByAllocation = AllocDesiredRun, "", ""
	e := h.Snapshot().Eval(nil, "e")
	h.must(&ApplyPlans{Plans: []*Plan{{EvalID: "e", EvalEpoch: e.ModifyIndex, Namespace: DefaultNamespace, JobID: "a", Place: []*Allocation{&again}}}})
	if a := h.Snapshot().Alloc(nil, victim); a.DesiredStatus != AllocDesiredEvict {
		t.Error("an update in place brought it back")
	}
	if err := h.Snapshot().Check(); err != nil {
		t.Error(err)
	}
}

func TestIndexOf(t *testing.T) {
	for name, want := range map[string]int{"a.g[0]": 0, "a.g[12]": 12, "a.g": -1, "a.g[x]": -1, "a[1].g[2]": 2, "a.g[1": -1} {
		if got := IndexOf(name); got != want {
			t.Errorf("%s: %d, want %d", name, got, want)
		}
	}
}
