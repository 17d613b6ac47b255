package cluster

import (
	"fmt"
	"strings"
	"testing"
)

func systemJob(id, jobType string) *Job {
	j := testJob(id, 1)
	j.Type, j.TaskGroups[0].Update = jobType, nil
	return j
}

// openEvals gives the open evaluations of a job.
func (h *harness) openEvals(id string) []*Evaluation {
	return h.Snapshot().OpenEvalsByJob(JobKey{DefaultNamespace, id})
}

func TestNodesEvaluateSystemJobs(t *testing.T) {
	h := newHarness(t)
	h.must(&RegisterJob{Job: systemJob("mon", JobTypeSystem), EvalID: h.id()})
	h.must(&RegisterJob{Job: testJob("web", 1), EvalID: h.id()})
	far := systemJob("far", JobTypeSysBatch)
	far.Datacenters = []string{"eu-*"}
	h.must(&RegisterJob{Job: far, EvalID: h.id()})
	form := systemJob("form", JobTypeSysBatch)
	form.ParameterizedJob = &ParameterizedJobConfig{Payload: PayloadOptional}
	h.must(&RegisterJob{Job: form})
	want := func(id string, n int) {
		t.Helper()
		if got := len(h.openEvals(id)); got != n {
			t.Fatalf("job %s has %d open evaluations, want %d", id, got, n)
		}
	}
	answer := func(id string) {
		t.Helper()
		for _, e := range h.openEvals(id) {
			h.must(&UpdateEvals{Evals: []*Evaluation{answered(e)}})
		}
		want(id, 0)
	}

	var nodes []*Node
	for range 50 { // one may be under way; the second answers for all that come meanwhile
		n := testNode(h.id())
		nodes = append(nodes, n)
		h.must(&RegisterNode{Node: n})
	}
	want("mon", 2)
	want("web", 1)
	want("far", 1)
	want("form", 0)
	evals := h.openEvals("mon")
	newest := max(evals[0].ModifyIndex, evals[1].ModifyIndex)
	if newest != h.index || min(evals[0].ModifyIndex, evals[1].ModifyIndex) == h.index {
		t.Fatalf("after entry %d the evaluations changed at %d and %d: a plan of the later one might not see the node", h.index, evals[0].ModifyIndex, evals[1].ModifyIndex)
	}
	answer("mon")

	again := *nodes[0]
	h.must(&RegisterNode{Node: &again})
	want("mon", 0) // nothing has changed
	changed := *nodes[0]
	changed.Meta = map[string]string{"rack": "r1"}
	h.must(&RegisterNode{Node: &changed})
	want("mon", 1)
	answer("mon")

	down := &UpdateNodeStatus{}
	up := &UpdateNodeStatus{}
	for _, n := range nodes {
		down.Updates = append(down.Updates, NodeStatusUpdate{NodeID: n.ID, Status: NodeStatusDown})
		up.Updates = append(up.Updates, NodeStatusUpdate{NodeID: n.ID, Status: NodeStatusReady})
	}
	h.must(down)
	want("mon", 0)
	h.must(up)
	want("mon", 1)
	answer("mon")

	id := nodes[0].ID
	h.must(&UpdateEligibility{NodeID: id, Eligibility: NodeIneligible})
	want("mon", 0)
	h.must(&UpdateEligibility{NodeID: id, Eligibility: NodeEligible})
	want("mon", 1)
	blocked := *h.openEvals("mon")[0]
	blocked.Status = EvalStatusBlocked
	h.must(&UpdateEvals{Evals: []*Evaluation{&blocked}})
	h.must(&RegisterNode{Node: testNode(h.id())})
	want("mon", 1) // it looks at all nodes again
	answer("mon")
	h.must(&UpdateDrain{NodeID: id, Strategy: &DrainStrategy{}})
	want("mon", 0)
	h.must(&UpdateDrain{NodeID: id, Complete: true})
	want("mon", 0)
	h.must(&UpdateDrain{NodeID: id, MarkEligible: true})
	want("mon", 1)
	answer("mon")

	h.must(&DeregisterJob{Namespace: DefaultNamespace, JobID: "mon", EvalID: h.id()})
	answer("mon")
	h.must(&RegisterNode{Node: testNode(h.id())})
	want("mon", 0)
	if s := h.job("mon").Status; s != JobStatusDead {
		t.Errorf("stopped, the job is %s", s)
	}
	h.encode = func(c Command) []byte { return encodeCommand(c, rulesChildren) }
	h.must(&RegisterJob{Job: systemJob("old", JobTypeSystem), EvalID: h.id()})
	answer("old")
	h.must(&RegisterNode{Node: testNode(h.id())})
	want("old", 0) // by older rules
}

func TestSystemJobsStayWhatTheyAre(t *testing.T) {
	h := newHarness(t)
	types := []string{JobTypeService, JobTypeBatch, JobTypeSystem, JobTypeSysBatch}
	for _, from := range types {
		for _, to := range types {
			id := fmt.Sprintf("%s-%s", from, to)
			h.must(&RegisterJob{Job: systemJob(id, from), EvalID: h.id()})
			again := systemJob(id, to)
			again.Meta = map[string]string{"a": "b"}
			res := h.do(&RegisterJob{Job: again, EvalID: h.id()})
			refused := from != to && (again.PerNode() || systemJob(id, from).PerNode())
			if (res.Err != nil) != refused || refused && !strings.Contains(res.Err.Text, "purge it first") {
				t.Errorf("from %s to %s: %v", from, to, res.Err)
			}
		}
	}
}
