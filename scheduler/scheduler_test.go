package scheduler

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/rxvision/rxvision/cluster"
)

func TestJobLife(t *testing.T) {
	inWorld(t, func(w *world) {
		w.node("n1", 0)
		first := w.run(service("web", 3))
		snap := w.agents()
		e := w.wantEval(snap, first, cluster.EvalStatusComplete)
		d := snap.Deployment(nil, e.DeploymentID)
		if d == nil || d.Status != cluster.DeploymentSuccessful {
			t.Fatalf("deployment of evaluation %s is %+v, want it successful", first, d)
		}
		w.wantLive(snap, "web", 3)

		w.run(service("web", 3, command("v1")))
		snap = w.settle()
		if as := snap.AllocsByDeployment(nil, snap.LatestDeployment(nil, cluster.JobKey{Namespace: "default", ID: "web"}).ID); len(as) != 1 {
			t.Fatalf("%d allocations of the new version before any is healthy, want 1", len(as))
		}
		snap = w.agents()
		for _, a := range w.wantLive(snap, "web", 3) {
			if a.JobVersion != 1 || a.PreviousAllocation == "" {
				t.Fatalf("after the roll-out %s has version %d and replaced %q", a.Name, a.JobVersion, a.PreviousAllocation)
			}
		}
		if d := snap.LatestDeployment(nil, cluster.JobKey{Namespace: "default", ID: "web"}); d.JobVersion != 1 || d.Status != cluster.DeploymentSuccessful {
			t.Fatalf("the roll-out ended as %+v", d)
		}

		w.must(&cluster.DeregisterJob{Namespace: "default", JobID: "web", EvalID: newID()})
		snap = w.agents()
		w.wantLive(snap, "web", 0)
		if j := snap.Job(nil, cluster.JobKey{Namespace: "default", ID: "web"}); j.Status != cluster.JobStatusDead {
			t.Fatalf("the stopped job is %s", j.Status)
		}
	})
}

func TestBlockedUntilRoom(t *testing.T) {
	inWorld(t, func(w *world) {
		w.node("n1", 1)
		w.run(service("a", 1, gpus(1), batch))
		w.agents()
		high := w.run(service("b", 1, gpus(1), batch, func(j *cluster.Job) { j.Priority = 20 }))
		snap := w.settle()
		blocked := w.wantEval(snap, high, cluster.EvalStatusComplete).BlockedEval
		w.wantEval(snap, blocked, cluster.EvalStatusBlocked)
		if n := snap.Summary(nil, cluster.JobKey{Namespace: "default", ID: "b"}).Summary["g"].Queued; n != 1 {
			t.Errorf("summary says %d queued, want 1", n)
		}
		low := w.run(service("c", 1, gpus(1), batch, func(j *cluster.Job) { j.Priority = 70 }))
		// Nothing that does not make room wakes blocked evaluations, or writes.
		index := w.settle().Index(nil)
		w.must(&cluster.SetSchedulerConfig{Config: &cluster.SchedulerConfiguration{SchedulerAlgorithm: "binpack"}})
		if got := w.settle().Index(nil); got != index+1 {
			t.Fatalf("index went from %d to %d by a change of settings", index, got)
		}
		w.say(w.wantLive(snap, "a", 1)[0], cluster.AllocClientComplete, true)
		snap = w.settle()
		w.wantLive(snap, "c", 1) // the higher priority
		w.wantLive(snap, "b", 0)
		w.wantEval(snap, snap.Eval(nil, low).BlockedEval, cluster.EvalStatusComplete)
		w.wantEval(snap, blocked, cluster.EvalStatusBlocked)
		w.node("n2", 1)
		snap = w.settle()
		w.wantLive(snap, "b", 1)
		w.wantEval(snap, blocked, cluster.EvalStatusComplete)
	})
}

func TestOneBlockedEvaluationPerJob(t *testing.T) {
	inWorld(t, func(w *world) {
		for i := range 4 {
			w.run(service("web", i+1))
			w.settle()
		}
		snap := w.settle()
		if open := snap.OpenEvals(nil); len(open) != 1 || open[0].Status != cluster.EvalStatusBlocked {
			t.Fatalf("%d evaluations are open, want one that is blocked", len(open))
		}
		w.node("n1", 0)
		w.wantLive(w.settle(), "web", 4)
	})
}

// TestUpdateKeepsItsGPU: a service that is updated on the only GPU gives it up
// to its own new version, not to a job that has waited longer.
func TestUpdateKeepsItsGPU(t *testing.T) {
	inWorld(t, func(w *world) {
		w.node("n1", 1)
		w.run(service("web", 1, gpus(1)))
		w.agents()
		w.run(service("greedy", 1, gpus(1)))
		w.settle()
		up := w.run(service("web", 1, gpus(1), command("v1")))
		if e := w.wantEval(w.settle(), up, cluster.EvalStatusComplete); len(e.FailedTGAllocs) > 0 {
			t.Fatalf("waiting for the old version is told as a failure: %+v", e.FailedTGAllocs)
		}
		snap := w.agents()
		if a := w.wantLive(snap, "web", 1)[0]; a.JobVersion != 1 {
			t.Fatalf("web runs version %d", a.JobVersion)
		}
		w.wantLive(snap, "greedy", 0)
	})
}

func TestFailedAllocationComesBackLater(t *testing.T) {
	inWorld(t, func(w *world) {
		w.node("n1", 0)
		w.run(service("web", 1))
		a := w.wantLive(w.agents(), "web", 1)[0]
		w.say(a, cluster.AllocClientFailed, false)
		w.wantLive(w.settle(), "web", 0)
		time.Sleep(29 * time.Second)
		w.wantLive(w.settle(), "web", 0)
		time.Sleep(2 * time.Second)
		b := w.wantLive(w.settle(), "web", 1)[0]
		if b.PreviousAllocation != a.ID || len(b.RescheduleTracker.Events) != 1 {
			t.Fatalf("the replacement is %+v", b)
		}
		w.say(b, cluster.AllocClientFailed, false)
		time.Sleep(59 * time.Second)
		w.wantLive(w.settle(), "web", 0) // the delay has doubled
		time.Sleep(2 * time.Second)
		w.wantLive(w.settle(), "web", 1)
	})
}

// TestUnhealthyAllocationIsReplaced: it runs, but its node found it unhealthy.
func TestUnhealthyAllocationIsReplaced(t *testing.T) {
	inWorld(t, func(w *world) {
		w.node("n1", 0)
		w.node("n2", 0)
		w.run(service("web", 1))
		a := w.wantLive(w.settle(), "web", 1)[0]
		w.say(a, cluster.AllocClientRunning, false)
		if b := w.wantLive(w.settle(), "web", 1)[0]; b.ID != a.ID {
			t.Fatal("it was replaced without the policy's delay")
		}
		time.Sleep(31 * time.Second)
		snap := w.agents()
		b := w.wantLive(snap, "web", 1)[0]
		if b.PreviousAllocation != a.ID || b.NodeID == a.NodeID {
			t.Fatalf("the replacement of %s on %s is %+v", a.ID, a.NodeID, b)
		}
		if d := snap.Deployment(nil, b.DeploymentID); d == nil || d.Status != cluster.DeploymentSuccessful {
			t.Fatalf("with a healthy replacement the deployment is %+v", d)
		}
	})
}

func TestDeploymentWithoutProgressFails(t *testing.T) {
	inWorld(t, func(w *world) {
		w.node("n1", 0)
		w.run(service("web", 2))
		snap := w.settle() // the nodes never say that anything is healthy
		d := snap.LatestDeployment(nil, cluster.JobKey{Namespace: "default", ID: "web"})
		time.Sleep(9 * time.Minute)
		if d := w.settle().Deployment(nil, d.ID); d.Status != cluster.DeploymentRunning {
			t.Fatalf("the deployment is %s before its deadline", d.Status)
		}
		time.Sleep(61 * time.Second)
		if d := w.settle().Deployment(nil, d.ID); d.Status != cluster.DeploymentFailed || d.StatusDescription != cluster.DeploymentDescProgressDeadline {
			t.Fatalf("after its deadline the deployment is %s: %s", d.Status, d.StatusDescription)
		}
	})
}

func TestLostNode(t *testing.T) {
	inWorld(t, func(w *world) {
		w.node("n1", 0)
		w.run(service("web", 2))
		w.agents()
		w.must(&cluster.UpdateNodeStatus{Updates: []cluster.NodeStatusUpdate{{NodeID: "n1", Status: cluster.NodeStatusDown}}})
		snap := w.settle()
		for _, a := range snap.AllocsByNode(nil, "n1") {
			if a.ClientStatus != cluster.AllocClientLost {
				t.Fatalf("allocation %s on the lost node is %s", a.Name, a.ClientStatus)
			}
		}
		w.node("n2", 0)
		for _, a := range w.wantLive(w.agents(), "web", 2) {
			if a.NodeID != "n2" || a.PreviousAllocation == "" {
				t.Fatalf("%s is on %s and replaced %q", a.Name, a.NodeID, a.PreviousAllocation)
			}
		}
	})
}

func TestDrain(t *testing.T) {
	inWorld(t, func(w *world) {
		w.node("n1", 0)
		w.run(service("web", 3))
		w.run(service("work", 1, batch))
		w.agents()
		w.node("n2", 0)
		w.must(&cluster.UpdateDrain{NodeID: "n1", Strategy: &cluster.DrainStrategy{Deadline: time.Hour}})
		snap := w.settle()
		if n := len(snap.AllocsByNode(nil, "n2")); n != 1 {
			t.Fatalf("%d allocations move at once, want migrate.max_parallel = 1", n)
		}
		snap = w.agents()
		if n := len(snap.AllocsByNode(nil, "n2")); n != 3 {
			t.Fatalf("%d allocations have moved, want 3", n)
		}
		if !snap.Node(nil, "n1").Drain {
			t.Fatal("the drain ended while batch work runs on the node")
		}
		if a := w.wantLive(snap, "work", 1)[0]; a.NodeID != "n1" {
			t.Fatal("batch work moved before the deadline")
		}
		time.Sleep(time.Hour + time.Second)
		snap = w.agents()
		if a := w.wantLive(snap, "work", 1)[0]; a.NodeID != "n2" {
			t.Fatal("batch work did not move at the deadline")
		}
		n := snap.Node(nil, "n1")
		if n.Drain || n.LastDrain.Status != "complete" || n.SchedulingEligibility != cluster.NodeIneligible {
			t.Fatalf("after the drain the node is %+v", n)
		}
	})
}

func TestForcedDrain(t *testing.T) {
	inWorld(t, func(w *world) {
		w.node("n1", 0)
		w.run(service("web", 3))
		w.agents()
		w.must(&cluster.UpdateDrain{NodeID: "n1", Strategy: &cluster.DrainStrategy{Deadline: -1}})
		snap := w.agents()
		if n := snap.Node(nil, "n1"); n.Drain {
			t.Fatal("a forced drain has not ended")
		}
		w.wantLive(snap, "web", 0)
		w.node("n2", 0)
		w.wantLive(w.agents(), "web", 3)
	})
}

// TestRefusedPlanIsRetried: the node that a plan chose goes away between the
// plan and its commit.
func TestRefusedPlanIsRetried(t *testing.T) {
	inWorld(t, func(w *world) {
		w.node("n1", 1)
		w.node("n2", 0)
		struck := false
		w.before = func(cmd cluster.Command) error {
			if p, ok := cmd.(*cluster.ApplyPlans); ok && !struck && len(p.Plans[0].Place) > 0 {
				struck = true
				w.must(&cluster.UpdateEligibility{NodeID: p.Plans[0].Place[0].NodeID, Eligibility: cluster.NodeIneligible})
			}
			return nil
		}
		e := w.run(service("web", 2))
		snap := w.settle()
		w.wantLive(snap, "web", 2)
		w.wantEval(snap, e, cluster.EvalStatusComplete)
		if !struck {
			t.Fatal("no plan was seen")
		}
	})
}

func TestGivesUpAfterRefusals(t *testing.T) {
	inWorld(t, func(w *world) {
		w.node("n1", 0)
		var refuse atomic.Bool
		refuse.Store(true)
		w.before = func(cmd cluster.Command) error {
			if p, ok := cmd.(*cluster.ApplyPlans); ok && refuse.Load() {
				for _, a := range p.Plans[0].Place {
					a.NodeID = "no-such-node"
				}
			}
			return nil
		}
		id := w.run(service("web", 1))
		e := w.wantEval(w.settle(), id, cluster.EvalStatusFailed)
		if !strings.Contains(e.StatusDescription, "maximum attempts reached (5)") || e.NextEval == "" {
			t.Fatalf("the failed evaluation says %q, next %q", e.StatusDescription, e.NextEval)
		}
		refuse.Store(false)
		time.Sleep(followUpDelay)
		snap := w.settle()
		w.wantEval(snap, e.NextEval, cluster.EvalStatusComplete)
		w.wantLive(snap, "web", 1)
	})
}

func TestStoreThatTakesNothing(t *testing.T) {
	inWorld(t, func(w *world) {
		w.node("n1", 0)
		var down atomic.Bool
		w.before = func(cmd cluster.Command) error {
			if _, ok := cmd.(*cluster.ApplyPlans); ok && down.Load() {
				return &cluster.Error{Code: cluster.CodeUnavailable, Text: "the disk is full"}
			}
			return nil
		}
		down.Store(true)
		e := w.run(service("web", 1))
		time.Sleep(20 * time.Second)
		w.wantEval(w.settle(), e, cluster.EvalStatusPending)
		down.Store(false)
		time.Sleep(maxBackoff)
		w.wantLive(w.settle(), "web", 1)
	})
}

// TestLeadership: a server that does not lead does nothing; one that leads again
// finds everything in the state, timers included.
func TestLeadership(t *testing.T) {
	inWorld(t, func(w *world) {
		w.node("n1", 0)
		w.run(service("web", 1))
		a := w.wantLive(w.agents(), "web", 1)[0]
		w.say(a, cluster.AllocClientFailed, false)
		w.settle()
		w.lead(false)
		w.settle()
		w.run(service("other", 1))
		time.Sleep(time.Minute)
		snap := w.settle()
		w.wantLive(snap, "web", 0)
		w.wantLive(snap, "other", 0)
		w.lead(true)
		snap = w.settle()
		w.wantLive(snap, "web", 1)
		w.wantLive(snap, "other", 1)
	})
}

func TestStateReplaced(t *testing.T) {
	inWorld(t, func(w *world) {
		w.node("n1", 0)
		w.run(service("web", 1))
		w.settle()
		fresh := cluster.NewState()
		w.mu.Lock()
		old := w.state
		w.state = fresh
		w.mu.Unlock()
		old.Abandon()
		w.settle()
		w.node("n9", 0)
		w.run(service("web", 2))
		for _, a := range w.wantLive(w.settle(), "web", 2) {
			if a.NodeID != "n9" {
				t.Fatalf("%s was placed on %s, a node of the state that is gone", a.Name, a.NodeID)
			}
		}
	})
}

func TestPause(t *testing.T) {
	inWorld(t, func(w *world) {
		w.node("n1", 0)
		set := func(paused bool) {
			w.must(&cluster.SetSchedulerConfig{Config: &cluster.SchedulerConfiguration{SchedulerAlgorithm: "binpack", PauseEvalBroker: paused}})
			w.settle()
		}
		set(true)
		w.run(service("web", 1))
		w.wantLive(w.settle(), "web", 0)
		set(false)
		w.wantLive(w.settle(), "web", 1)
	})
}

// TestRefusedPartIsPlannedAgain: of a change in several parts one meets a node that has gone.
// The parts after it wait for another plan, which places what is missing and ends the evaluation.
func TestRefusedPartIsPlannedAgain(t *testing.T) {
	inWorld(t, func(w *world) {
		w.check = false
		for i := range 4 {
			w.node(fmt.Sprintf("n%d", i), 0)
		}
		parts, refused := 0, ""
		w.before = func(cmd cluster.Command) error {
			p, ok := cmd.(*cluster.ApplyPlans)
			if !ok || len(p.Plans[0].Place) == 0 {
				return nil
			}
			if parts++; parts == 3 {
				refused = p.Plans[0].Place[0].NodeID
				w.must(&cluster.UpdateEligibility{NodeID: refused, Eligibility: cluster.NodeIneligible})
			}
			return nil
		}
		small := func(j *cluster.Job) { *j.TaskGroups[0].Tasks[0].Resources = cluster.Resources{CPU: 1, MemoryMB: 1} }
		e := w.run(service("big", 3000, small, batch))
		snap := w.settle()
		w.wantLive(snap, "big", 3000)
		w.wantEval(snap, e, cluster.EvalStatusComplete)
		names := map[string]bool{}
		for _, a := range snap.AllocsByJob(nil, cluster.JobKey{Namespace: cluster.DefaultNamespace, ID: "big"}) {
			names[a.Name] = true
		}
		if refused == "" || len(names) != 3000 {
			t.Fatalf("node %q was refused, %d names are given out", refused, len(names))
		}
	})
}

// TestBigJob: a change that does not fit into one log entry takes several, and
// its evaluation ends once.
func TestBigJob(t *testing.T) {
	inWorld(t, func(w *world) {
		w.check = false // it walks everything; once at the end is enough
		for i := range 40 {
			w.node(fmt.Sprintf("n%02d", i), 0)
		}
		small := func(j *cluster.Job) { *j.TaskGroups[0].Tasks[0].Resources = cluster.Resources{CPU: 1, MemoryMB: 1} }
		e := w.run(service("big", 3000, small, batch))
		snap := w.settle()
		w.wantLive(snap, "big", 3000)
		w.wantEval(snap, e, cluster.EvalStatusComplete)
		if w.plans < 5 {
			t.Fatalf("3,000 allocations went into %d entries", w.plans)
		}
		w.must(&cluster.DeregisterJob{Namespace: "default", JobID: "big", EvalID: newID()})
		w.wantLive(w.settle(), "big", 0)

		all := w.run(service("gang", 3000, small, batch, func(j *cluster.Job) { j.AllAtOnce = true }))
		snap = w.settle()
		w.wantLive(snap, "gang", 0)
		if e := w.wantEval(snap, all, cluster.EvalStatusFailed); !strings.Contains(e.StatusDescription, "bytes") {
			t.Fatalf("the evaluation says %q", e.StatusDescription)
		}
	})
}

// TestManyJobsShareEntries: what arrives together is committed together.
func TestManyJobsShareEntries(t *testing.T) {
	inWorld(t, func(w *world) {
		w.check = false
		for i := range 10 {
			w.node(fmt.Sprintf("n%d", i), 0)
		}
		w.settle()
		w.lead(false)
		w.settle()
		for i := range 300 {
			w.run(service(fmt.Sprintf("job%d", i), 1, func(j *cluster.Job) {
				*j.TaskGroups[0].Tasks[0].Resources = cluster.Resources{CPU: 10, MemoryMB: 10}
			}))
		}
		w.lead(true)
		snap := w.settle()
		if open := snap.OpenEvals(nil); len(open) > 0 {
			t.Fatalf("%d evaluations are open", len(open))
		}
		if w.plans > 2*300/maxBatch {
			t.Errorf("300 plans took %d entries", w.plans)
		}
	})
}

func TestCollection(t *testing.T) {
	inWorld(t, func(w *world) {
		w.node("n1", 0)
		w.run(service("web", 2))
		w.run(service("done", 1, batch))
		snap := w.agents()
		w.say(w.wantLive(snap, "done", 1)[0], cluster.AllocClientComplete, true)
		old := w.wantLive(snap, "web", 2)[0]
		w.run(service("web", 2, command("v1")))
		w.agents()

		time.Sleep(90 * time.Minute)
		w.evaluate("web")
		w.evaluate("done")
		snap = w.settle()
		if snap.Alloc(nil, old.ID) != nil {
			t.Error("a replaced allocation is kept for ever")
		}
		w.wantLive(snap, "web", 2)
		if as := snap.AllocsByJob(nil, cluster.JobKey{Namespace: "default", ID: "done"}); len(as) != 1 {
			t.Errorf("batch work that is done has %d allocations; it must neither be forgotten nor run again", len(as))
		}
		if snap.LatestDeployment(nil, cluster.JobKey{Namespace: "default", ID: "web"}) == nil {
			t.Error("the latest deployment was forgotten")
		}
		time.Sleep(4*time.Hour + 10*time.Minute)
		snap = w.settle()
		if snap.Job(nil, cluster.JobKey{Namespace: "default", ID: "done"}) != nil || len(snap.EvalsByJob(nil, cluster.JobKey{Namespace: "default", ID: "done"})) > 0 {
			t.Error("a dead batch job is kept for ever")
		}
		if snap.Job(nil, cluster.JobKey{Namespace: "default", ID: "web"}) == nil {
			t.Error("a running service was forgotten")
		}
	})
}

func TestDryRun(t *testing.T) {
	inWorld(t, func(w *world) {
		w.node("n1", 0)
		w.run(service("web", 2))
		snap := w.agents()
		index := snap.Index(nil)
		for _, c := range []struct {
			job  *cluster.Job
			want cluster.DesiredUpdates
		}{
			{service("new", 3), cluster.DesiredUpdates{Place: 3}},
			{service("web", 2), cluster.DesiredUpdates{Ignore: 2}},
			{service("web", 3), cluster.DesiredUpdates{InPlaceUpdate: 2, Place: 1}},
			{service("web", 1), cluster.DesiredUpdates{InPlaceUpdate: 1, Stop: 1}},
			{service("web", 2, command("v1")), cluster.DesiredUpdates{DestructiveUpdate: 1, Ignore: 1}},
			{service("web", 2, gpus(1)), cluster.DesiredUpdates{DestructiveUpdate: 1, Ignore: 1}},
		} {
			r, err := DryRun(snap, c.job, now())
			if err != nil {
				t.Fatal(err)
			}
			if got := *r.Annotations.DesiredTGUpdates["g"]; got != c.want {
				t.Errorf("%s: %+v, want %+v", c.job.ID, got, c.want)
			}
			if (len(r.Failed) > 0) != (len(c.job.TaskGroups[0].Tasks[0].Resources.Devices) > 0) {
				t.Errorf("%s: failed %+v", c.job.ID, r.Failed)
			}
		}
		_, err := DryRun(snap, service("web", 1, func(j *cluster.Job) {
			j.TaskGroups[0].Tasks[0].Model = &cluster.ModelRef{Reference: "nope", Name: "nope"}
		}), now())
		if err == nil || !strings.Contains(err.Error(), `group.g.task.t.config.model: unknown model "nope"`) {
			t.Errorf("an unknown model: %v", err)
		}
		if got := w.settle().Index(nil); got != index {
			t.Errorf("dry runs moved the index from %d to %d", index, got)
		}
	})
}

// TestDrainsUnderFaults is for the race detector and the invariants: several
// workers, nodes that come and go, a store that refuses now and then, leadership
// that comes and goes. When the faults stop, all work is done.
func TestDrainsUnderFaults(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	const jobs, nodes = 60, 6
	s := newMemStore(t)
	var mu sync.Mutex
	rnd := rand.New(rand.NewPCG(seed, 0))
	chance := func(n int) bool { mu.Lock(); defer mu.Unlock(); return rnd.IntN(n) == 0 }
	var faults atomic.Bool
	faults.Store(true)
	s.before = func(cmd cluster.Command) error {
		if _, ok := cmd.(*cluster.ApplyPlans); ok && faults.Load() && chance(4) {
			return cluster.ErrNoLeader
		}
		return nil
	}
	stop := startScheduler(t, s, Config{Workers: 4})
	defer stop()
	for i := range nodes {
		s.node(fmt.Sprintf("n%d", i), 2)
	}
	for i := range jobs {
		s.run(service(fmt.Sprintf("job%d", i), 1+i%3, batch, gpus(uint64(1+i%2)), func(j *cluster.Job) { j.Priority = 1 + i%100 }))
		if i%10 == 5 {
			n := fmt.Sprintf("n%d", i/10)
			s.must(&cluster.UpdateNodeStatus{Updates: []cluster.NodeStatusUpdate{{NodeID: n, Status: cluster.NodeStatusDown}}})
			s.lead(false)
			s.lead(true)
			s.must(&cluster.UpdateNodeStatus{Updates: []cluster.NodeStatusUpdate{{NodeID: n, Status: cluster.NodeStatusReady}}})
		}
	}
	faults.Store(false)
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	for { // the agents: whatever is placed ends well
		snap := s.State().Snapshot()
		ws := make(cluster.WatchSet)
		open := len(snap.OpenEvals(ws))
		cmd := &cluster.UpdateAllocs{}
		for _, a := range snap.Allocs(ws, "") {
			if !a.ClientTerminal() {
				cmd.Allocs = append(cmd.Allocs, &cluster.Allocation{ID: a.ID, Epoch: a.Epoch, ClientStatus: cluster.AllocClientComplete})
			}
		}
		if len(cmd.Allocs) > 0 {
			s.must(cmd)
			continue
		}
		if open == 0 {
			break
		}
		if err := ws.WatchCtx(ctx); errors.Is(err, context.DeadlineExceeded) {
			for _, e := range s.State().Snapshot().OpenEvals(nil) {
				t.Logf("open: %+v", *e)
			}
			t.Fatal("evaluations are left open though there is room")
		}
	}
	snap := s.State().Snapshot()
	for _, j := range snap.Jobs(nil, "*", "") {
		names := map[string]bool{}
		for _, a := range snap.AllocsByJob(nil, j.Key()) {
			if a.ClientStatus == cluster.AllocClientComplete && a.DesiredStatus == cluster.AllocDesiredRun {
				names[a.Name] = true
			}
		}
		if len(names) != j.TaskGroups[0].Count {
			t.Errorf("job %s has %d of %d allocations done", j.ID, len(names), j.TaskGroups[0].Count)
		}
	}
}

// BenchmarkPlace measures registered one-allocation jobs until all are placed,
// first all at once (backlog), then one after the other (idle).
func BenchmarkPlace(b *testing.B) {
	for _, nodes := range []int{100, 1000, 10_000} {
		start := func(b *testing.B) *memStore {
			s := newMemStore(b)
			s.check = false
			for i := range nodes {
				n := s.node(fmt.Sprintf("n%05d", i), 0)
				n.NodeResources.Cpu.CpuShares, n.NodeResources.Memory.MemoryMB = 1e9, 1e9
				n.NodeResources.Disk.DiskMB = 1e9
				s.must(&cluster.RegisterNode{Node: n})
			}
			return s
		}
		settled := func(s *memStore) {
			for {
				snap := s.State().Snapshot()
				ws := make(cluster.WatchSet)
				if len(snap.OpenEvals(ws)) == 0 {
					return
				}
				_ = ws.WatchCtx(context.Background())
			}
		}
		b.Run(fmt.Sprintf("backlog/nodes=%d", nodes), func(b *testing.B) {
			s := start(b)
			for i := range b.N {
				s.run(service(fmt.Sprintf("job%d", i), 1))
			}
			s.plans = 0
			b.ResetTimer()
			cpu := cpuTime(b)
			stop := startScheduler(b, s, Config{})
			defer stop()
			settled(s)
			b.ReportMetric(float64((cpuTime(b)-cpu).Microseconds())/float64(b.N), "cpu-µs/op")
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "placed/s")
			b.ReportMetric(float64(b.N)/float64(s.plans), "plans/entry")
		})
		b.Run(fmt.Sprintf("idle/nodes=%d", nodes), func(b *testing.B) {
			s := start(b)
			stop := startScheduler(b, s, Config{})
			defer stop()
			settled(s)
			b.ResetTimer()
			cpu := cpuTime(b)
			for i := range b.N {
				s.run(service(fmt.Sprintf("job%d", i), 1))
				settled(s)
			}
			b.ReportMetric(float64((cpuTime(b)-cpu).Microseconds())/float64(b.N), "cpu-µs/op")
		})
	}
}

// cpuTime is what this process has used of all cores: the figure to trust on a
// machine that has other work.
func cpuTime(tb testing.TB) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		tb.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
