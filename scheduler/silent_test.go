package scheduler

import (
	"strings"
	"testing"
	"time"

	"github.com/rxvision/rxvision/cluster"
)

// disconnects gives a job's group a disconnect block.
func disconnects(lostAfter time.Duration, reconcile string) func(*cluster.Job) {
	return func(j *cluster.Job) {
		j.TaskGroups[0].Disconnect = &cluster.DisconnectStrategy{LostAfter: lostAfter, Replace: true, Reconcile: reconcile}
	}
}

func (s *memStore) status(node, status string) {
	s.tb.Helper()
	s.must(&cluster.UpdateNodeStatus{Updates: []cluster.NodeStatusUpdate{{NodeID: node, Status: status}}})
}

// TestDisconnectedNodeIsGivenUp: unknown and replaced at once, lost when its time
// is over, and the node with it.
func TestDisconnectedNodeIsGivenUp(t *testing.T) {
	inWorld(t, func(w *world) {
		w.node("n1", 1)
		w.run(service("web", 1, gpus(1), disconnects(time.Hour, cluster.ReconcileKeepOriginal)))
		a := w.wantLive(w.agents(), "web", 1)[0]
		w.node("n2", 1)
		w.status("n1", cluster.NodeStatusDown)
		snap := w.settle()
		if s := snap.Node(nil, "n1").Status; s != cluster.NodeStatusDisconnected {
			t.Fatalf("the node is %s", s)
		}
		if a := snap.Alloc(nil, a.ID); a.ClientStatus != cluster.AllocClientUnknown || a.DesiredStatus != cluster.AllocDesiredRun {
			t.Fatalf("the allocation is %s, to %s", a.ClientStatus, a.DesiredStatus)
		}
		b := snap.Alloc(nil, snap.Alloc(nil, a.ID).NextAllocation)
		if b == nil || b.NodeID != "n2" || b.PreviousAllocation != a.ID || len(b.RescheduleTracker.Events) != 1 || b.Epoch <= a.Epoch {
			t.Fatalf("its replacement is %+v", b)
		}
		time.Sleep(59 * time.Minute)
		if s := w.settle().Alloc(nil, a.ID).ClientStatus; s != cluster.AllocClientUnknown {
			t.Fatalf("the allocation is %s before its time", s)
		}
		time.Sleep(time.Minute + time.Second)
		snap = w.settle()
		if a := snap.Alloc(nil, a.ID); a.ClientStatus != cluster.AllocClientLost || a.DesiredStatus != cluster.AllocDesiredStop {
			t.Fatalf("after lost_after the allocation is %s, to %s", a.ClientStatus, a.DesiredStatus)
		}
		if s := snap.Node(nil, "n1").Status; s != cluster.NodeStatusDown {
			t.Fatalf("after lost_after the node is %s", s)
		}
		if got := w.wantLive(snap, "web", 1)[0]; got.ID != b.ID {
			t.Fatalf("%s runs, not the replacement", got.ID)
		}
		if open := snap.OpenEvals(nil); len(open) != 0 {
			t.Fatalf("%d evaluations are left open", len(open))
		}
	})
}

// TestReturningNodeIsReconciled: one of original and replacement goes on, by the
// block's choice, and if the original does it counts as never replaced.
func TestReturningNodeIsReconciled(t *testing.T) {
	for _, c := range []struct {
		reconcile string
		original  bool
	}{
		{cluster.ReconcileKeepOriginal, true}, {cluster.ReconcileKeepReplacement, false}, {cluster.ReconcileLongestRunning, true},
	} {
		t.Run(c.reconcile, func(t *testing.T) {
			inWorld(t, func(w *world) {
				w.node("n1", 0)
				w.run(service("web", 1, disconnects(time.Hour, c.reconcile)))
				a := w.wantLive(w.agents(), "web", 1)[0]
				w.node("n2", 0)
				w.status("n1", cluster.NodeStatusDown)
				b := w.settle().AllocsByNode(nil, "n2")[0]
				w.say(b, cluster.AllocClientRunning, true)
				w.must(&cluster.RegisterNode{Node: w.State().Snapshot().Node(nil, "n2")})
				w.status("n1", cluster.NodeStatusReady)
				if live := live(w.settle(), "web"); len(live) != 2 {
					t.Fatalf("%d allocations live before the node has spoken, want both", len(live))
				}
				w.say(a, cluster.AllocClientRunning, true)
				snap := w.agents()
				kept, gone := a, b
				if !c.original {
					kept, gone = b, a
				}
				if got := w.wantLive(snap, "web", 1)[0]; got.ID != kept.ID || got.ClientStatus != cluster.AllocClientRunning {
					t.Fatalf("%s goes on, want %s", got.ID, kept.ID)
				}
				if g := snap.Alloc(nil, gone.ID); g.DesiredStatus != cluster.AllocDesiredStop || !strings.Contains(g.DesiredDescription, "reconnect") {
					t.Fatalf("the other one is to %s: %s", g.DesiredStatus, g.DesiredDescription)
				}
				w.say(kept, cluster.AllocClientFailed, false)
				time.Sleep(10 * time.Second)
				w.wantLive(w.settle(), "web", 0) // its policy's delay passes first
				time.Sleep(time.Minute)
				w.wantLive(w.settle(), "web", 1)
			})
		})
	}
}

// TestNodeReturnsWhileItIsGivenUp: the node is back between the plan that gives
// it up and the commit of that plan.
func TestNodeReturnsWhileItIsGivenUp(t *testing.T) {
	inWorld(t, func(w *world) {
		w.node("n1", 0)
		w.node("n2", 0)
		w.run(service("web", 1))
		a := w.wantLive(w.agents(), "web", 1)[0]
		struck := false
		w.before = func(cmd cluster.Command) error {
			if p, ok := cmd.(*cluster.ApplyPlans); ok && !struck && len(p.Plans[0].Stop) > 0 {
				struck = true
				w.status(a.NodeID, cluster.NodeStatusReady)
			}
			return nil
		}
		w.status(a.NodeID, cluster.NodeStatusDown)
		snap := w.settle()
		if !struck {
			t.Fatal("no plan was seen")
		}
		if got := w.wantLive(snap, "web", 1)[0]; got.ID != a.ID || got.ClientStatus != cluster.AllocClientRunning {
			t.Fatalf("%s on %s is %s", got.ID, got.NodeID, got.ClientStatus)
		}
		if n := len(snap.AllocsByJob(nil, a.JobKey())); n != 1 {
			t.Fatalf("the job has %d allocations", n)
		}
	})
}

// TestHoldPausesReplacements: while many nodes are silent nothing is lost, and it
// says why; then those that stay away are replaced and the others just go on.
func TestHoldPausesReplacements(t *testing.T) {
	inWorld(t, func(w *world) {
		w.node("n1", 0)
		w.node("n2", 0)
		w.node("n3", 0)
		spread := func(j *cluster.Job) {
			j.Constraints = []*cluster.Constraint{{Operand: "distinct_hosts"}}
			j.TaskGroups[0].Update.MaxParallel = 2
		}
		w.run(service("web", 2, spread))
		w.run(service("wait", 2, spread, disconnects(time.Minute, cluster.ReconcileBestScore)))
		before := map[string]bool{}
		snap := w.agents()
		for _, a := range append(w.wantLive(snap, "web", 2), w.wantLive(snap, "wait", 2)...) {
			before[a.ID] = true
		}
		w.must(&cluster.SetFleetHold{Hold: &cluster.FleetHold{Nodes: 3, Of: 3, Reason: "3 of 3 nodes fell silent"}})
		for _, n := range []string{"n1", "n2", "n3"} {
			w.status(n, cluster.NodeStatusDisconnected)
		}
		time.Sleep(time.Hour)
		snap = w.settle()
		for id := range before {
			if a := snap.Alloc(nil, id); a.ClientStatus != cluster.AllocClientRunning || a.ServerTerminal() {
				t.Fatalf("%s is %s, to %s", a.Name, a.ClientStatus, a.DesiredStatus)
			}
		}
		reasons := map[string]bool{}
		for _, e := range snap.OpenEvals(nil) {
			if e.Status != cluster.EvalStatusBlocked || !strings.Contains(e.StatusDescription, "3 of 3 nodes fell silent") {
				t.Errorf("evaluation of %s is %s: %s", e.JobID, e.Status, e.StatusDescription)
			}
			reasons[e.JobID] = true
		}
		if len(reasons) != 2 {
			t.Fatalf("%d jobs say why they are not replaced, want 2", len(reasons))
		}
		index := snap.Index(nil)
		w.status("n3", cluster.NodeStatusReady) // makes room, and changes nothing else
		if got := w.settle().Index(nil); got > index+3 {
			t.Fatalf("a returning node during the hold moved the index from %d to %d", index, got)
		}

		w.status("n2", cluster.NodeStatusReady)
		w.must(&cluster.SetFleetHold{})
		w.status("n1", cluster.NodeStatusDown)
		snap = w.settle()
		for id := range before {
			a := snap.Alloc(nil, id)
			want := cluster.AllocClientRunning
			if a.NodeID == "n1" {
				want = map[string]string{"web": cluster.AllocClientLost, "wait": cluster.AllocClientUnknown}[a.JobID]
			}
			if a.ClientStatus != want {
				t.Errorf("%s on %s is %s, want %s", a.Name, a.NodeID, a.ClientStatus, want)
			}
		}
		time.Sleep(2 * time.Minute)
		snap = w.agents()
		w.wantLive(snap, "web", 2)
		w.wantLive(snap, "wait", 2)
		if open := snap.OpenEvals(nil); len(open) != 0 {
			t.Errorf("%d evaluations are left open, the first %+v", len(open), open[0])
		}
	})
}
