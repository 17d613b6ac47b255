package cluster

import (
	"fmt"
	"reflect"
	"testing"
)

// TestPlanAnswersOthers: the plan of one evaluation completes the others of its job
// that it names, and no other.
func TestPlanAnswersOthers(t *testing.T) {
	const job, e = "a", "e"
	other := func(change func(*Evaluation)) *Evaluation {
		o := &Evaluation{Namespace: DefaultNamespace, JobID: job, Type: JobTypeService, Priority: 50, Status: EvalStatusPending, TriggeredBy: TriggerAllocFailure}
		change(o)
		return o
	}
	stay := map[string]*Evaluation{ // though the plan names them
		"due later":         other(func(o *Evaluation) { o.Wait, o.WaitUntil = 1, 2e18 }),
		"was due":           other(func(o *Evaluation) { o.WaitUntil = 1 }),
		"blocked":           other(func(o *Evaluation) { o.Status = EvalStatusBlocked }),
		"cancelled":         other(func(o *Evaluation) { o.Status = EvalStatusCanceled }),
		"of another job":    other(func(o *Evaluation) { o.JobID = "b" }),
		"elsewhere":         other(func(o *Evaluation) { o.Namespace = "elsewhere" }),
		"changed meanwhile": other(func(*Evaluation) {}),
		"not named":         other(func(*Evaluation) {}),
	}
	failed := map[string]*AllocMetric{"web": {NodesEvaluated: 3}}
	for _, c := range []struct {
		name    string
		status  string // of the plan's evaluation before
		plan    func(p *Plan, own *Evaluation)
		answers bool
		want    Evaluation // what the others take over
	}{
		{"complete", EvalStatusPending, func(_ *Plan, own *Evaluation) {
			own.Status, own.DeploymentID, own.QueuedAllocations = EvalStatusComplete, "d", map[string]int{"web": 0}
		}, true, Evaluation{DeploymentID: "d", QueuedAllocations: map[string]int{"web": 0}}},
		{"leaves a blocked one", EvalStatusPending, func(_ *Plan, own *Evaluation) {
			own.Status, own.BlockedEval, own.FailedTGAllocs, own.QueuedAllocations = EvalStatusComplete, "later", failed, map[string]int{"web": 1}
		}, true, Evaluation{DeploymentID: "own", BlockedEval: "later", FailedTGAllocs: failed, QueuedAllocations: map[string]int{"web": 1}}},
		{"stays blocked", EvalStatusBlocked, func(_ *Plan, own *Evaluation) {
			own.Status, own.FailedTGAllocs = EvalStatusBlocked, failed
		}, true, Evaluation{DeploymentID: "own", BlockedEval: e, FailedTGAllocs: failed}},
		{"goes on", EvalStatusPending, func(p *Plan, _ *Evaluation) { p.Evals = nil }, false, Evaluation{}},
		{"fails", EvalStatusPending, func(_ *Plan, own *Evaluation) { own.Status = EvalStatusFailed }, false, Evaluation{}},
		{"is stale", EvalStatusPending, func(p *Plan, own *Evaluation) {
			own.Status = EvalStatusComplete
			p.EvalEpoch--
		}, false, Evaluation{}},
		{"is refused in part", EvalStatusPending, func(p *Plan, own *Evaluation) {
			own.Status = EvalStatusComplete
			p.Place[0].NodeID = "no-such-node"
		}, false, Evaluation{}},
		{"answers before its snapshot", EvalStatusPending, func(_ *Plan, own *Evaluation) {
			own.Status, own.SnapshotIndex = EvalStatusComplete, 1
		}, false, Evaluation{}},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := newHarness(t)
			node := testNode("00000001")
			h.must(&RegisterNode{Node: node})
			h.must(&RegisterJob{Job: testJob(job, 1), EvalID: e})
			h.must(&RegisterJob{Job: testJob("b", 1), EvalID: "b's"})
			j, own := h.Snapshot().Job(nil, JobKey{DefaultNamespace, job}), *h.Snapshot().Eval(nil, e)
			own.Status = c.status
			cmd := &UpdateEvals{Evals: []*Evaluation{&own, other(func(o *Evaluation) { o.ID, o.DeploymentID = "o", "own" })}}
			for id, o := range stay {
				o.ID = id
				cmd.Evals = append(cmd.Evals, o)
			}
			h.must(cmd)
			own = *h.Snapshot().Eval(nil, e)
			own.SnapshotIndex = h.Snapshot().Index(nil)
			h.must(&UpdateEvals{Evals: []*Evaluation{stay["changed meanwhile"]}})
			was := map[string]*Evaluation{}
			for id := range stay {
				was[id] = h.Snapshot().Eval(nil, id)
			}
			before := h.Snapshot().Eval(nil, "o")

			p := &Plan{
				EvalID: e, EvalEpoch: own.ModifyIndex, Namespace: DefaultNamespace, JobID: job, JobVersion: j.Version,
				Place: []*Allocation{testAlloc(h, &own, j, node)}, Evals: []*Evaluation{&own}, Answers: []string{"o", e, "nobody"},
			}
			for _, id := range sortedKeys(stay) {
				if id != "not named" {
					p.Answers = append(p.Answers, id)
				}
			}
			c.plan(p, &own)
			h.must(&ApplyPlans{Plans: []*Plan{p}})

			snap := h.Snapshot()
			now := map[string]*Evaluation{}
			for id := range stay {
				now[id] = snap.Eval(nil, id)
			}
			if !reflect.DeepEqual(now, was) {
				t.Error("an evaluation that must stay has changed")
			}
			got := snap.Eval(nil, "o")
			if !c.answers {
				if got != before {
					t.Errorf("it was answered: %+v", got)
				}
				return
			}
			want := *before
			want.Status, want.StatusDescription, want.SnapshotIndex = EvalStatusComplete, "answered by evaluation e", own.SnapshotIndex
			want.DeploymentID, want.BlockedEval = c.want.DeploymentID, c.want.BlockedEval
			want.FailedTGAllocs, want.QueuedAllocations = c.want.FailedTGAllocs, c.want.QueuedAllocations
			want.ModifyIndex, want.ModifyTime = snap.Index(nil, TableEvals), got.ModifyTime
			if !reflect.DeepEqual(got, &want) {
				t.Errorf("the other evaluation is %+v\nwant %+v", got, &want)
			}
			if err := snap.Check(); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestPlanAnswersAreBounded: a plan that names too many answers the first of them.
func TestPlanAnswersAreBounded(t *testing.T) {
	h := newHarness(t)
	h.must(&RegisterJob{Job: testJob("a", 1), EvalID: "e"})
	cmd := &UpdateEvals{}
	p := &Plan{EvalID: "e", Namespace: DefaultNamespace, JobID: "a"}
	for i := range MaxAnswered + 5 {
		id := fmt.Sprintf("o%04d", i)
		cmd.Evals = append(cmd.Evals, &Evaluation{ID: id, Namespace: DefaultNamespace, JobID: "a", Status: EvalStatusPending})
		p.Answers = append(p.Answers, id)
	}
	h.must(cmd)
	own := answered(h.Snapshot().Eval(nil, "e"))
	own.SnapshotIndex = h.Snapshot().Index(nil)
	p.Evals = []*Evaluation{own}
	h.must(&ApplyPlans{Plans: []*Plan{p}})
	if open := h.Snapshot().OpenEvals(nil); len(open) != 5 || open[0].ID != fmt.Sprintf("o%04d", MaxAnswered) {
		t.Errorf("%d evaluations are open, want the last 5", len(open))
	}
}
