package cluster

import (
	"testing"
	"time"
)

// TestSilentNode: a node of which something is awaited is disconnected, not down,
// until that is given up; a plan that gives up what has come back is not applied.
func TestSilentNode(t *testing.T) {
	h := newHarness(t)
	n, other := testNode(h.id()), testNode(h.id())
	h.must(&RegisterNode{Node: n})
	h.must(&RegisterNode{Node: other})
	j := testJob("a", 1)
	j.TaskGroups[0].Disconnect = &DisconnectStrategy{LostAfter: time.Minute, Replace: true}
	a, _ := h.place(j, n, nil)
	node := func() *Node { return h.Snapshot().Node(nil, n.ID) }
	alloc := func() *Allocation { return h.Snapshot().Alloc(nil, a.ID) }
	say := func(status string) {
		h.must(&UpdateAllocs{NodeID: n.ID, Allocs: []*Allocation{{ID: a.ID, ClientStatus: status}}})
	}
	// giveUp answers the job's newest evaluation by a plan with one stop.
	giveUp := func(status string, place ...*Allocation) PlanResult {
		var e *Evaluation
		for _, x := range h.Snapshot().EvalsByJob(nil, a.JobKey()) {
			if x.Status == EvalStatusPending && (e == nil || x.CreateIndex > e.CreateIndex) {
				e = x
			}
		}
		if e == nil {
			t.Fatal("no evaluation of the job is open")
		}
		s := &AllocStop{AllocID: a.ID, ClientStatus: status}
		if status == AllocClientLost {
			s.DesiredStatus = AllocDesiredStop
		}
		for _, p := range place {
			p.PreviousAllocation, p.EvalID = a.ID, e.ID
		}
		return h.must(&ApplyPlans{Plans: []*Plan{{
			EvalID: e.ID, EvalEpoch: e.ModifyIndex, Namespace: "default", JobID: "a", Stop: []*AllocStop{s}, Place: place, Evals: []*Evaluation{answered(e)},
		}}}).Plans[0]
	}
	down := &UpdateNodeStatus{Updates: []NodeStatusUpdate{{NodeID: n.ID, Status: NodeStatusDown}}}

	h.must(down)
	if s := node().Status; s != NodeStatusDown {
		t.Fatalf("a node where nothing has run yet is %s, want it down", s)
	}
	h.must(&RegisterNode{Node: n})
	if r := giveUp(AllocClientLost); !r.Stale || alloc().Terminal() {
		t.Fatalf("a plan gave up what has come back: %+v", r)
	}
	say(AllocClientRunning)
	h.must(down)
	if s := node().Status; s != NodeStatusDisconnected {
		t.Fatalf("a node of which something is awaited is %s, want it disconnected", s)
	}
	b := testAlloc(h, &Evaluation{}, h.Snapshot().Job(nil, a.JobKey()), other)
	if r := giveUp(AllocClientUnknown, b); r.Stale || alloc().ClientStatus != AllocClientUnknown || alloc().UnknownSince == 0 {
		t.Fatalf("%+v; the allocation is %+v", r, alloc())
	}
	if alloc().Terminal() || !alloc().Occupies() || alloc().NextAllocation != b.ID {
		t.Fatalf("an unknown allocation keeps what it has and knows its replacement: %+v", alloc())
	}

	// It returns: whoever plans next has the choice, and says which one goes on.
	h.must(&RegisterNode{Node: n})
	epoch := alloc().Epoch
	say(AllocClientRunning)
	if got := alloc(); got.ClientStatus != AllocClientRunning || got.UnknownSince != 0 || got.Epoch != epoch {
		t.Fatalf("the returned allocation is %+v", got)
	}
	var reconnect *Evaluation
	for _, e := range h.Snapshot().EvalsByJob(nil, a.JobKey()) {
		if e.TriggeredBy == TriggerReconnect {
			reconnect = e
		}
	}
	if reconnect == nil {
		t.Fatal("nobody was asked to reconcile original and replacement")
	}
	h.must(&ApplyPlans{Plans: []*Plan{{
		EvalID: reconnect.ID, Namespace: "default", JobID: "a",
		Stop: []*AllocStop{{AllocID: b.ID, DesiredStatus: AllocDesiredStop, Keeps: a.ID}}, Evals: []*Evaluation{answered(reconnect)},
	}}})
	if alloc().NextAllocation != "" {
		t.Errorf("the allocation that goes on counts as replaced by %s", alloc().NextAllocation)
	}

	// It goes for good: with what was awaited the node is given up.
	h.must(down)
	giveUp(AllocClientUnknown)
	h.now += int64(time.Hour)
	h.must(&UpdateEvals{Evals: []*Evaluation{{ID: h.id(), Namespace: "default", JobID: "a", Status: EvalStatusPending}}})
	giveUp(AllocClientLost)
	if s := node().Status; s != NodeStatusDown || alloc().Occupies() {
		t.Errorf("the node is %s, the allocation %s", s, alloc().ClientStatus)
	}
	say(AllocClientRunning)
	if s := alloc().ClientStatus; s != AllocClientLost {
		t.Errorf("a lost allocation came back as %s", s)
	}
}

// TestHoldKeepsNodes: while replacements are paused a disconnected node stays so.
func TestHoldKeepsNodes(t *testing.T) {
	h := newHarness(t)
	n := testNode(h.id())
	h.must(&RegisterNode{Node: n})
	a, _ := h.place(testJob("a", 1), n, nil)
	h.must(&UpdateAllocs{NodeID: n.ID, Allocs: []*Allocation{{ID: a.ID, ClientStatus: AllocClientRunning}}})
	h.must(&SetFleetHold{Hold: &FleetHold{Nodes: 1, Of: 1, Reason: "all nodes are silent"}})
	h.must(&UpdateNodeStatus{Updates: []NodeStatusUpdate{{NodeID: n.ID, Status: NodeStatusDisconnected}}})
	open := len(h.Snapshot().OpenEvals(nil))
	capacity := h.Snapshot().Index(nil, IndexCapacity)
	h.must(&SetFleetHold{})
	if s := h.Snapshot(); len(s.OpenEvals(nil)) != open+1 || s.Index(nil, IndexCapacity) == capacity {
		t.Error("the end of the hold wakes nobody")
	}
}

// TestLateWordsOfANode: what a node said through a server that forwarded it late does
// not undo what it has said since, about itself and about its allocations.
func TestLateWordsOfANode(t *testing.T) {
	h := newHarness(t)
	id := h.id()
	register := func(revision uint64, healthy bool) {
		t.Helper()
		n := testNode(id)
		n.Revision, n.NodeResources.Devices[0].Instances[0].Healthy = revision, healthy
		h.must(&RegisterNode{Node: n})
	}
	check := func(healthy bool, status string) {
		t.Helper()
		n := h.Snapshot().Node(nil, id)
		if got := n.NodeResources.Devices[0].Instances[0].Healthy; got != healthy || n.Status != status {
			t.Fatalf("the device's health is %t and the node is %s, want %t and %s", got, n.Status, healthy, status)
		}
	}
	register(Revision(5, 2), true)
	register(Revision(5, 3), false)
	register(Revision(5, 2), true)
	check(false, NodeStatusReady)
	h.must(&UpdateNodeStatus{Updates: []NodeStatusUpdate{{NodeID: id, Status: NodeStatusDown}}})
	register(Revision(4, 9), true)
	check(false, NodeStatusDown)
	register(Revision(5, 3), false) // it comes again as it was
	check(false, NodeStatusReady)
	register(Revision(6, 0), true)
	check(true, NodeStatusReady)
	register(0, false) // an agent that keeps no order
	check(false, NodeStatusReady)

	a, _ := h.place(testJob("a", 1), h.Snapshot().Node(nil, id), nil)
	said := func(revision uint64, status, want string) {
		t.Helper()
		h.must(&UpdateAllocs{NodeID: id, Allocs: []*Allocation{{ID: a.ID, Revision: revision, ClientStatus: status}}})
		if got := h.Snapshot().Alloc(nil, a.ID).ClientStatus; got != want {
			t.Fatalf("after a word of revision %d the allocation is %s, want %s", revision, got, want)
		}
	}
	said(Revision(6, 4), AllocClientRunning, AllocClientRunning)
	said(Revision(6, 3), AllocClientPending, AllocClientRunning)
	said(Revision(5, 8), AllocClientFailed, AllocClientRunning)
	said(Revision(7, 0), AllocClientPending, AllocClientPending)
	said(0, AllocClientRunning, AllocClientRunning)
	said(Revision(6, 9), AllocClientPending, AllocClientRunning)
	said(Revision(7, 1), AllocClientComplete, AllocClientComplete)
}
