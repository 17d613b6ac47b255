package scheduler

import (
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rxvision/rxvision/cluster"
)

func key(job string) cluster.JobKey {
	return cluster.JobKey{Namespace: cluster.DefaultNamespace, ID: job}
}

// collected runs whole collections by hand and gives how many.
func (w *world) collected(keep Retention, times int) *cluster.Snapshot {
	w.t.Helper()
	steps := NewSteps(keep, newID)
	for range times {
		for _, cmd := range steps.Collect(w.State().Snapshot(), now()) {
			w.must(cmd)
		}
	}
	return w.State().Snapshot()
}

// TestNewestFailureStays: of failures that were replaced the newest of each group
// is kept for as long as the job.
func TestNewestFailureStays(t *testing.T) {
	inWorld(t, func(w *world) {
		w.node("n1", 0)
		w.run(service("web", 1, func(j *cluster.Job) {
			j.TaskGroups[0].ReschedulePolicy = &cluster.ReschedulePolicy{Unlimited: true, Delay: 5 * time.Second, DelayFunction: "constant"}
		}))
		var failed []string
		for range 3 {
			a := w.wantLive(w.agents(), "web", 1)[0]
			failed = append(failed, a.ID)
			w.say(a, cluster.AllocClientFailed, false)
			time.Sleep(6 * time.Second)
		}
		runs := w.wantLive(w.agents(), "web", 1)[0]
		time.Sleep(48 * time.Hour)
		var left []string
		for _, a := range w.settle().AllocsByJob(nil, key("web")) {
			left = append(left, a.ID)
		}
		want := []string{failed[2], runs.ID}
		slices.Sort(want)
		if !slices.Equal(left, want) {
			t.Fatalf("after two days %v are kept, want the last failure and what runs, %v", left, want)
		}
		snap := w.settle()
		if snap.Eval(nil, runs.EvalID) == nil {
			t.Error("the evaluation of an allocation that runs was forgotten")
		}
		if n := len(snap.EvalsByJob(nil, key("web"))); n != 2 {
			t.Errorf("%d evaluations are kept, want those of two allocations", n)
		}
	})
}

// TestVersionsAndNodes: versions that have stopped running, and nodes that stay
// away, are forgotten; what still holds something is not.
func TestVersionsAndNodes(t *testing.T) {
	inWorld(t, func(w *world) {
		w.node("n1", 0)
		w.node("n2", 0)
		w.run(service("web", 1))
		w.agents()
		w.must(&cluster.SetJobStability{Namespace: "default", JobID: "web", Version: 0, Stable: false})
		stuck := w.wantLive(w.settle(), "web", 1)[0]
		for i := range 10 {
			w.run(service("web", 1, command(fmt.Sprint(i)), func(j *cluster.Job) { j.TaskGroups[0].Update.MaxParallel = 2 }))
			w.settle() // the old allocation is asked to stop but does not end
		}
		if v := w.settle().JobVersion(nil, key("web"), 0); v == nil {
			t.Fatal("a version that runs was forgotten")
		}
		w.agents()
		w.settle()
		time.Sleep(6 * time.Minute)
		snap := w.settle()
		if snap.JobVersion(nil, key("web"), stuck.JobVersion) != nil {
			t.Error("a version that ran longer than it is tracked is kept for ever")
		}
		if n := len(snap.JobVersions(nil, key("web"))); n != cluster.MaxJobVersions {
			t.Errorf("%d versions are kept", n)
		}

		on := w.wantLive(snap, "web", 1)[0].NodeID
		off := map[string]string{"n1": "n2", "n2": "n1"}[on]
		w.status(off, cluster.NodeStatusDown)
		time.Sleep(23 * time.Hour)
		if w.settle().Node(nil, off) == nil {
			t.Fatal("a node was forgotten before its time")
		}
		time.Sleep(2 * time.Hour)
		if snap := w.settle(); snap.Node(nil, off) != nil || snap.Node(nil, on) == nil {
			t.Error("a node that is down for a day is kept, or one that is there is not")
		}
	})
}

// TestTooManyLeaveEarly: beyond the bounds by count the oldest leave first,
// whatever their age.
func TestTooManyLeaveEarly(t *testing.T) {
	inWorld(t, func(w *world) {
		w.check = false
		w.node("n1", 0)
		one := func(j *cluster.Job) {
			*j.TaskGroups[0].Tasks[0].Resources = cluster.Resources{CPU: 1, MemoryMB: 1}
		}
		for i := range 3 {
			for j := range 20 {
				w.run(service(fmt.Sprintf("job%d", j), 1, one, command(fmt.Sprintf("v%d-%d", i, j))))
			}
			w.agents()
			time.Sleep(10 * time.Minute)
		}
		ended := func(snap *cluster.Snapshot) (allocs, evals int, oldest time.Duration) {
			for _, a := range snap.Allocs(nil, "") {
				if a.ClientTerminal() {
					allocs++
					oldest = max(oldest, now().Std().Sub(time.Unix(0, a.ModifyTime)))
				}
			}
			for _, e := range snap.Evals(nil, "") {
				if e.Terminal() {
					evals++
				}
			}
			return allocs, evals, oldest
		}
		w.lead(false)
		if n, _, _ := ended(w.settle()); n != 40 {
			t.Fatalf("%d allocations have ended, want 40", n)
		}
		snap := w.collected(Retention{MaxEndedAllocs: 30}, 2)
		if n, _, oldest := ended(snap); n != 20 || oldest > 15*time.Minute {
			t.Errorf("%d ended allocations are kept, the oldest for %s; want the 20 of the last ten minutes", n, oldest)
		}
		for j := range 20 {
			w.wantLive(snap, fmt.Sprintf("job%d", j), 1)
		}
		snap = w.collected(Retention{MaxEndedAllocs: 1, MaxEndedEvals: 1}, 3)
		if n, _, _ := ended(snap); n != 20 {
			t.Errorf("%d ended allocations are kept; those that ended last stay", n)
		}
		if n := len(snap.Deployments(nil, "")); n != 60 {
			t.Fatalf("%d deployments, want 60", n)
		}
		first := map[string]string{}
		for _, d := range snap.Deployments(nil, "") {
			if d.JobVersion == 0 {
				first[d.JobID] = d.ID
			}
		}
		snap = w.collected(Retention{DeploymentGCThreshold: 48 * time.Hour, MaxEndedDeployments: 1}, 2)
		if n := len(snap.Deployments(nil, "")); n != 40 {
			t.Errorf("%d deployments are kept; want the newest of each job, and those that ended last", n)
		}
		for job, id := range first {
			if snap.Deployment(nil, id) != nil {
				t.Errorf("the oldest deployment of %s is kept", job)
			}
		}

		// Of one job.
		for i := range 30 {
			w.run(service("web", 1, one, command(fmt.Sprint(i))))
			w.lead(true)
			w.agents()
			w.lead(false)
			w.settle()
		}
		snap = w.collected(Retention{MaxEndedAllocsOfJob: 5}, 1)
		n := 0
		for _, a := range snap.AllocsByJob(nil, key("web")) {
			if a.ClientTerminal() {
				n++
			}
		}
		if n != 5 {
			t.Errorf("%d ended allocations of one job are kept, want 5", n)
		}
	})
}

// TestForcedCollection forgets at once what has ended, on a server that does not
// lead too, and nothing else.
func TestForcedCollection(t *testing.T) {
	inWorld(t, func(w *world) {
		w.node("n1", 0)
		w.node("n2", 0)
		w.run(service("web", 1))
		w.run(service("done", 1, batch))
		w.run(service("stopped", 1))
		w.run(service("purged", 1))
		snap := w.agents()
		w.say(w.wantLive(snap, "done", 1)[0], cluster.AllocClientComplete, true)
		w.must(&cluster.DeregisterJob{Namespace: "default", JobID: "stopped", EvalID: newID()})
		w.must(&cluster.DeregisterJob{Namespace: "default", JobID: "purged", Purge: true, EvalID: newID()})
		snap = w.agents()
		web := w.wantLive(snap, "web", 1)[0]
		w.status(map[string]string{"n1": "n2", "n2": "n1"}[web.NodeID], cluster.NodeStatusDown)
		w.must(&cluster.UpsertACLTokens{Tokens: []*cluster.ACLToken{{
			AccessorID: newID(), SecretHash: fmt.Sprintf("%064d", 1), Name: "short", Type: cluster.ACLTokenManagement,
			ExpirationTime: int64(now().Add(time.Minute)),
		}}})
		w.settle()
		w.lead(false)
		time.Sleep(2 * time.Minute)
		s, err := New(Config{Store: w.memStore, Logger: testLogger(t)})
		if err != nil {
			t.Fatal(err)
		}
		if err := s.ForceGC(w.t.Context()); err != nil {
			t.Fatal(err)
		}
		snap = w.settle()
		for _, job := range []string{"done", "stopped", "purged"} {
			if snap.Job(nil, key(job)) != nil || len(snap.AllocsByJob(nil, key(job)))+len(snap.EvalsByJob(nil, key(job)))+len(snap.JobVersions(nil, key(job))) > 0 {
				t.Errorf("something of job %s is left", job)
			}
		}
		if got := w.wantLive(snap, "web", 1)[0]; got.ID != web.ID || snap.Eval(nil, web.EvalID) == nil {
			t.Error("something live is gone")
		}
		if n := len(snap.Nodes(nil, "")); n != 1 {
			t.Errorf("%d nodes are left", n)
		}
		if n := len(snap.ACLTokens(nil, "")); n != 0 {
			t.Errorf("%d expired tokens are left", n)
		}
	})
}

// TestReapIsBounded: however much has ended, no command is large.
func TestReapIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &world{newMemStore(t), t}
		w.check = false
		w.must(&cluster.RegisterJob{Job: service("web", 0)})
		for range 20 {
			cmd := &cluster.UpdateEvals{}
			for i := range 1000 {
				cmd.Evals = append(cmd.Evals, &cluster.Evaluation{ID: newID(), Namespace: "default", JobID: fmt.Sprintf("job-%d", i%100), Status: cluster.EvalStatusComplete})
			}
			w.must(cmd)
		}
		time.Sleep(2 * time.Hour)
		pages, total := 0, 0
		steps := NewSteps(Retention{}, newID)
		for done := false; !done; pages++ {
			var cmds []cluster.Command
			if cmds, done = steps.collector.page(w.State().Snapshot(), now()); done {
				break
			}
			for _, cmd := range cmds {
				r := cmd.(*cluster.Reap)
				if n := len(r.Evals); n > reapRecords || len(cluster.EncodeCommand(cmd)) > 2*reapBytes {
					t.Fatalf("a command of %d bytes forgets %d evaluations", len(cluster.EncodeCommand(cmd)), n)
				}
				total += len(r.Evals)
				w.must(cmd)
			}
		}
		if total != 20_000 || pages < 4 {
			t.Errorf("%d pages forgot %d evaluations", pages, total)
		}
	})
}

// TestWeekOfBatchJobs lets the real scheduler run a thousand batch jobs an hour
// for a week of virtual time (in short: 120 an hour for 14 hours) on nodes that
// finish them, some of them badly, and come and go. Once the first jobs are due
// to be forgotten no table grows any more.
func TestWeekOfBatchJobs(t *testing.T) {
	perHour, hours := 120, 14
	if os.Getenv("RXVISION_TEST_LONG") != "" {
		perHour, hours = 1000, 7*24
	}
	inWorld(t, func(w *world) {
		w.check = false
		rnd := rand.New(rand.NewPCG(7, 7))
		for i := range 10 {
			w.node(fmt.Sprintf("n%d", i), 2)
		}
		var most map[string]int
		var heap, early uint64
		for hour := range hours {
			for i := range perHour {
				w.run(service(fmt.Sprintf("train-%d-%d", hour, i), 1, batch, func(j *cluster.Job) {
					*j.TaskGroups[0].Tasks[0].Resources = cluster.Resources{CPU: 10, MemoryMB: 10}
				}))
				time.Sleep(time.Hour / time.Duration(perHour))
				w.finish(rnd)
			}
			n := fmt.Sprintf("n%d", hour%10)
			w.status(n, cluster.NodeStatusDown)
			w.finish(rnd)
			w.status(n, cluster.NodeStatusReady)
			counts := w.counts()
			if hour >= 8 { // JobGCThreshold, and a collection more
				for table, n := range counts {
					if limit := most[table]*5/4 + 20; n > limit {
						t.Fatalf("hour %d: table %s holds %d records, after 8 hours it was %d", hour, table, n, most[table])
					}
				}
			} else {
				most = counts
			}
			if hour == 8 || hour == hours-1 {
				runtime.GC()
				var m runtime.MemStats
				runtime.ReadMemStats(&m)
				early, heap = max(early, heap), m.HeapAlloc
				if early > 0 && heap > 2*early+32<<20 { // the results of 100,000 commands among it
					t.Errorf("the heap grew from %d to %d KiB", early>>10, heap>>10)
				}
			}
		}
		t.Logf("%d jobs in %d hours; at the end %v; heap %d KiB after 8 hours, %d KiB at the end", perHour*hours, hours, w.counts(), early>>10, heap>>10)
	})
}

// finish does what nodes do with batch work: it starts and ends, one in ten badly.
func (w *world) finish(rnd *rand.Rand) {
	for again := true; again; {
		snap := w.settle()
		again = false
		for _, n := range snap.Nodes(nil, "") {
			if n.Silent() {
				continue
			}
			for _, a := range snap.AllocsHolding(nil, n.ID) {
				again = true
				switch {
				case a.ClientStatus == cluster.AllocClientPending:
					w.say(a, cluster.AllocClientRunning, true)
				case rnd.IntN(10) == 0:
					w.say(a, cluster.AllocClientFailed, false)
				default:
					w.say(a, cluster.AllocClientComplete, true)
				}
			}
		}
	}
}

// counts gives how many records each table holds, the results of commands aside.
func (w *world) counts() map[string]int {
	counts := map[string]int{}
	_ = w.State().Snapshot().Records(func(t *cluster.Table, _ string, _ any) error {
		if t.Name != cluster.TableResults {
			counts[t.Name]++
		}
		return nil
	})
	return counts
}

// TestLineageOutlivesItsJob: what a model version names as its origin is found however
// long ago it ended, and when everything is collected at once; other runs of the job leave.
func TestLineageOutlivesItsJob(t *testing.T) {
	inWorld(t, func(w *world) {
		w.node("n1", 0)
		w.run(service("train", 2))
		allocs := w.wantLive(w.agents(), "train", 2)
		origin := allocs[0]
		w.must(&cluster.CreateModelVersion{Version: &cluster.ModelVersion{
			Model: "m", Digest: "sha256:" + fmt.Sprintf("%064d", 1), Origin: &cluster.ModelOrigin{AllocID: origin.ID},
		}})
		w.must(&cluster.DeregisterJob{Namespace: "default", JobID: "train", EvalID: newID()})
		w.agents()
		time.Sleep(7 * 24 * time.Hour)
		kept := func(snap *cluster.Snapshot, when string) {
			w.t.Helper()
			if snap.Alloc(nil, origin.ID) == nil || snap.Eval(nil, origin.EvalID) == nil || snap.Job(nil, key("train")) == nil ||
				snap.JobVersion(nil, key("train"), origin.JobVersion) == nil {
				t.Errorf("%s the origin of a model was forgotten", when)
			}
			if n := len(snap.AllocsByJob(nil, key("train"))); n != 1 {
				t.Errorf("%s %d allocations of the job are kept, want the model's origin", when, n)
			}
		}
		kept(w.settle(), "after a week")
		kept(w.collected(Retention{EvalGCThreshold: time.Nanosecond, BatchEvalGCThreshold: time.Nanosecond, JobGCThreshold: time.Nanosecond, MaxEndedAllocs: 1}, 2), "with no patience")
	})
}

// TestEnrolmentsOfAbsentNodes: who enrolled and never came, or went away and was
// collected, stays enrolled for KeepEnrollment and no longer, also where nothing else
// is collected.
func TestEnrolmentsOfAbsentNodes(t *testing.T) {
	inWorld(t, func(w *world) {
		hash := func(n int) string { return fmt.Sprintf("%064x", n) }
		w.must(&cluster.CreateIntroToken{Token: &cluster.IntroToken{
			ID: newID(), SecretHash: hash(1), Role: cluster.RoleNode, ExpiresTime: int64(now().Add(time.Hour)),
		}})
		for i, name := range []string{"never", "gone", "here"} {
			w.must(&cluster.UseIntroToken{SecretHash: hash(1), Role: cluster.RoleNode, Name: name, KeyHash: hash(10 + i)})
		}
		w.node("gone", 0)
		w.node("here", 0)
		w.status("gone", cluster.NodeStatusDown)
		enrolled := func() string {
			var names []string
			for _, e := range w.settle().Enrollments(nil, "") {
				names = append(names, e.Name)
			}
			return fmt.Sprint(names)
		}
		time.Sleep(48 * time.Hour)
		if n := w.settle().Node(nil, "gone"); n != nil {
			t.Error("the node that went away was not collected")
		}
		if got := enrolled(); got != "[gone here never]" {
			t.Errorf("after two days %s are enrolled", got)
		}
		time.Sleep(cluster.KeepEnrollment)
		if got := enrolled(); got != "[here]" {
			t.Errorf("after all that time %s are enrolled", got)
		}
	})
}
