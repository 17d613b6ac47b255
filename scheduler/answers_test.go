package scheduler

import (
	"slices"
	"testing"
	"time"

	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/scheduler/place"
)

// TestRegistrationsAnsweredTogether: of evaluations of one job that wait side by side
// one is planned, and all tell of its outcome.
func TestRegistrationsAnsweredTogether(t *testing.T) {
	inWorld(t, func(w *world) {
		w.settle()
		w.lead(false)
		w.settle()
		first := w.run(service("web", 2))
		second := w.run(service("web", 3, command("v1")))
		w.lead(true)
		snap := w.settle()
		e, other := w.wantEval(snap, first, cluster.EvalStatusComplete), w.wantEval(snap, second, cluster.EvalStatusComplete)
		w.wantEval(snap, e.BlockedEval, cluster.EvalStatusBlocked)
		if other.StatusDescription != "answered by evaluation "+first || other.BlockedEval != e.BlockedEval ||
			other.FailedTGAllocs["g"] == nil || other.QueuedAllocations["g"] != 3 {
			t.Fatalf("without room the second registration's evaluation ends as %+v", other)
		}
		if w.plans != 1 {
			t.Errorf("%d entries with plans, want 1", w.plans)
		}

		w.node("n1", 0)
		snap = w.agents()
		w.wantLive(snap, "web", 3)
		w.lead(false)
		w.settle()
		var evals []string
		for _, v := range []string{"v2", "v3", "v4"} {
			evals = append(evals, w.run(service("web", 3, command(v))))
		}
		w.lead(true)
		snap = w.settle()
		d := snap.LatestDeployment(nil, cluster.JobKey{Namespace: "default", ID: "web"})
		for _, id := range evals {
			if e := w.wantEval(snap, id, cluster.EvalStatusComplete); e.DeploymentID != d.ID || d.JobVersion != 4 {
				t.Errorf("evaluation %s tells of deployment %s, want %s of version %d", id, e.DeploymentID, d.ID, d.JobVersion)
			}
		}
		for _, a := range w.wantLive(w.agents(), "web", 3) {
			if a.JobVersion != 4 {
				t.Errorf("%s runs version %d", a.Name, a.JobVersion)
			}
		}
	})
}

// TestPlanNamesWhatItAnswers: a plan does not answer what waits for its time, or
// would leave a blocked evaluation of a higher priority.
func TestPlanNamesWhatItAnswers(t *testing.T) {
	s := newMemStore(t)
	own := s.run(service("web", 1))
	pending := func(id string, change ...func(*cluster.Evaluation)) *cluster.Evaluation {
		e := &cluster.Evaluation{ID: id, Namespace: cluster.DefaultNamespace, JobID: "web", Priority: 50, Status: cluster.EvalStatusPending}
		for _, c := range change {
			c(e)
		}
		return e
	}
	s.must(&cluster.UpdateEvals{Evals: []*cluster.Evaluation{
		pending("1"), pending("2", func(e *cluster.Evaluation) { e.Priority = 49 }),
		pending("3", func(e *cluster.Evaluation) { e.Priority = 51 }),
		pending("4", func(e *cluster.Evaluation) { e.WaitUntil = 1 }),
		pending("5", func(e *cluster.Evaluation) { e.Wait = time.Second }),
		pending("6", func(e *cluster.Evaluation) { e.Status = cluster.EvalStatusBlocked }),
		pending("7", func(e *cluster.Evaluation) { e.JobID = "other" }),
	}})
	snap := s.State().Snapshot()
	r := planOne(place.NewView(snap), snap, snap.Eval(nil, own), now(), newID, 1)
	if want := []string{"1", "2"}; !slices.Equal(r.Plan.Answers, want) {
		t.Errorf("the plan answers %q, want %q", r.Plan.Answers, want)
	}
	s.node("n1", 0)
	big := service("web", 2000, func(j *cluster.Job) { *j.TaskGroups[0].Tasks[0].Resources = cluster.Resources{CPU: 1, MemoryMB: 1} })
	own = s.run(big)
	snap = s.State().Snapshot()
	if r := planOne(place.NewView(snap), snap, snap.Eval(nil, own), now(), newID, 1); !r.More || len(r.Plan.Answers) > 0 {
		t.Errorf("a plan that is cut short (%v) answers %q", r.More, r.Plan.Answers)
	}
}
