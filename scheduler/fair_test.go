package scheduler

import (
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/scheduler/place"
)

// in puts a job into a namespace.
func in(namespace string) func(*cluster.Job) { return func(j *cluster.Job) { j.Namespace = namespace } }

func meta(kv ...string) func(*cluster.Job) {
	return func(j *cluster.Job) {
		j.Meta = map[string]string{}
		for i := 0; i < len(kv); i += 2 {
			j.Meta[kv[i]] = kv[i+1]
		}
	}
}

func (s *memStore) tenants(names ...string) {
	for _, name := range names {
		s.must(&cluster.UpsertNamespaces{Namespaces: []*cluster.Namespace{{Name: name}}})
	}
}

// TestNobodyIsStarved: one namespace floods a region of four GPUs, another comes later with a few jobs. As work
// ends both get as much.
func TestNobodyIsStarved(t *testing.T) {
	inWorld(t, func(w *world) {
		w.tenants("flood", "few")
		w.node("n1", 4)
		for i := range 40 {
			w.run(service(fmt.Sprintf("f%d", i), 1, gpus(1), batch, in("flood")))
			w.settle()
		}
		w.agents()
		for i := range 6 {
			w.run(service(fmt.Sprintf("s%d", i), 1, gpus(1), batch, in("few")))
			w.settle()
		}
		w.agents()
		running := func(snap *cluster.Snapshot) map[string]int {
			n := map[string]int{}
			for _, a := range snap.Allocs(nil, "") {
				if !a.Terminal() {
					n[a.Namespace]++
				}
			}
			return n
		}
		if n := running(w.settle()); n["flood"] != 4 {
			t.Fatalf("running: %v", n)
		}
		for ended := 1; ended <= 4; ended++ {
			for _, a := range w.State().Snapshot().Allocs(nil, "") {
				if a.Namespace == "flood" && !a.Terminal() {
					w.say(a, cluster.AllocClientComplete, true)
					break
				}
			}
			snap := w.agents()
			if n := running(snap); n["few"] != min(ended, 2) { // then both hold as much
				t.Fatalf("after %d ends: %v", ended, n)
			}
		}
	})
}

// TestPriorityBeforeShares: a namespace that holds much is served first where its priority is higher.
func TestPriorityBeforeShares(t *testing.T) {
	inWorld(t, func(w *world) {
		w.tenants("rich", "poor")
		w.node("n1", 2)
		w.run(service("r", 2, gpus(1), batch, in("rich")))
		w.agents()
		w.run(service("p", 1, gpus(1), batch, in("poor")))
		w.run(service("urgent", 1, gpus(1), batch, in("rich"), func(j *cluster.Job) { j.Priority = 51 }))
		w.settle()
		w.say(w.State().Snapshot().AllocsByJob(nil, cluster.JobKey{Namespace: "rich", ID: "r"})[0], cluster.AllocClientComplete, true)
		if n := len(w.settle().AllocsByJob(nil, cluster.JobKey{Namespace: "rich", ID: "urgent"})); n != 1 {
			t.Errorf("urgent has %d allocations, want 1", n)
		}
	})
}

// TestSharesDecay: what was held counts half as much after a half-life.
func TestSharesDecay(t *testing.T) {
	s := newMemStore(t)
	s.tenants("a")
	s.node("n1", 4)
	q := newQueue()
	e := s.run(service("j", 2, gpus(1), batch, in("a")))
	view := place.NewView(s.State().Snapshot())
	snap := s.State().Snapshot()
	r := planOne(view, snap, snap.Eval(nil, e), now(), newID, 1)
	s.must(&cluster.ApplyPlans{Plans: []*cluster.Plan{r.Plan}})
	at := cluster.Time(1e18)
	share := func() float64 {
		q.weigh(s.State().Snapshot(), at)
		return q.fair.tenant("a").share
	}
	if got := share(); math.Abs(got-1) > 1e-9 { // half of the GPUs now, and taken for the past
		t.Fatalf("share %v, want 1", got)
	}
	for _, a := range s.State().Snapshot().Allocs(nil, "") {
		s.say(a, cluster.AllocClientComplete, true)
	}
	if got := share(); math.Abs(got-0.5) > 1e-9 {
		t.Fatalf("share %v after the end, want 0.5", got)
	}
	at = at.Add(fairHalfLife)
	if got := share(); math.Abs(got-0.25) > 1e-9 {
		t.Fatalf("share %v a half-life later, want 0.25", got)
	}
	at = at.Add(100 * fairHalfLife)
	if q.weigh(s.State().Snapshot(), at); len(q.fair.tenants) != 0 {
		t.Errorf("namespaces are remembered for ever: %v", q.fair.tenants)
	}
}

// TestQueueTakesTurns gives out evaluations of several namespaces with random shares: always one of the smallest
// share within the highest priority, the oldest first within a namespace, and all of them in the end.
func TestQueueTakesTurns(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 3))
	q := newQueue()
	q.fair.capacity = map[string]float64{"cpu": 1000}
	q.fair.job = func(k cluster.JobKey) *cluster.Job {
		return &cluster.Job{TaskGroups: []*cluster.TaskGroup{{Count: 1, Tasks: []*cluster.Task{{Resources: &cluster.Resources{CPU: 1 + len(k.ID)}}}}}}
	}
	var open []*cluster.Evaluation
	left := map[string]*cluster.Evaluation{}
	for i := range 300 {
		e := &cluster.Evaluation{
			ID: fmt.Sprint("e", i), Namespace: fmt.Sprint("n", rnd.IntN(5)), JobID: fmt.Sprint("j", i), Priority: 50 + rnd.IntN(2),
			CreateIndex: uint64(i + 1), ModifyIndex: uint64(i + 1), Status: cluster.EvalStatusPending,
		}
		open, left[e.ID] = append(open, e), e
	}
	q.sync(all(open), 0, false, 1)
	for len(left) > 0 {
		shares, first := map[string]float64{}, map[string]*cluster.Evaluation{}
		for name, x := range q.fair.tenants {
			shares[name] = x.share
		}
		top := 0
		for _, e := range left {
			top = max(top, e.Priority)
		}
		least := math.Inf(1)
		for _, e := range left {
			if e.Priority != top {
				continue
			}
			least = min(least, shares[e.Namespace])
			if f := first[e.Namespace]; f == nil || e.CreateIndex < f.CreateIndex {
				first[e.Namespace] = e
			}
		}
		batch := q.takeReady(1)
		if len(batch) != 1 {
			t.Fatalf("nothing is given out of %d", len(left))
		}
		e := batch[0].eval
		if e.Priority != top || shares[e.Namespace] != least || first[e.Namespace] != e {
			t.Fatalf("%s of %s with priority %d and share %v is given out; shares %v", e.ID, e.Namespace, e.Priority, shares[e.Namespace], shares)
		}
		delete(left, e.ID)
		if rnd.IntN(3) == 0 {
			q.ended(batch[0])
		}
	}
}

// TestQuotaHoldsBack: what is over a quota waits, says so in upstream's words, and goes on when there is room.
func TestQuotaHoldsBack(t *testing.T) {
	inWorld(t, func(w *world) {
		limit := func(cpu int64) *cluster.UpsertQuotas {
			return &cluster.UpsertQuotas{Quotas: []*cluster.Quota{{Name: "q", Limits: []*cluster.QuotaLimit{{Region: "global", CPU: &cpu}}}}}
		}
		w.must(limit(2500))
		w.must(&cluster.UpsertNamespaces{Namespaces: []*cluster.Namespace{{Name: "x", Quota: "q"}}})
		w.node("n1", 0)
		id := w.run(service("j", 4, batch, in("x")))
		snap := w.agents()
		if n := len(snap.AllocsByJob(nil, cluster.JobKey{Namespace: "x", ID: "j"})); n != 2 {
			t.Fatalf("%d allocations, want 2", n)
		}
		e := w.wantEval(snap, id, cluster.EvalStatusComplete)
		m := e.FailedTGAllocs["g"]
		if m == nil || !slices.Equal(m.QuotaExhausted, []string{"cpu exhausted (3000 needed > 2500 limit)"}) || m.NodesEvaluated != 1 || m.CoalescedFailures != 1 {
			t.Fatalf("reasons: %+v", m)
		}
		if b := w.wantEval(snap, e.BlockedEval, cluster.EvalStatusBlocked); b.QuotaLimitReached != "q" {
			t.Errorf("blocked: %+v", b)
		}
		w.must(limit(3000))
		if n := len(w.agents().AllocsByJob(nil, cluster.JobKey{Namespace: "x", ID: "j"})); n != 3 {
			t.Fatalf("%d allocations with the greater quota, want 3", n)
		}
		index := w.settle().Index(nil)
		w.must(limit(3000)) // wakes it in vain: nothing is written
		if got := w.settle().Index(nil); got != index+1 {
			t.Errorf("index went from %d to %d", index, got)
		}
		w.say(w.settle().AllocsByJob(nil, cluster.JobKey{Namespace: "x", ID: "j"})[0], cluster.AllocClientComplete, true)
		snap = w.agents()
		if n := len(snap.AllocsByJob(nil, cluster.JobKey{Namespace: "x", ID: "j"})); n != 4 {
			t.Fatalf("%d allocations after an end, want 4", n)
		}
		w.wantEval(snap, e.BlockedEval, cluster.EvalStatusComplete)
	})
}

// TestUpdateWithinQuota: a rolling update goes on though the quota has no room for old and new.
func TestUpdateWithinQuota(t *testing.T) {
	inWorld(t, func(w *world) {
		cpu := int64(2000)
		w.must(&cluster.UpsertQuotas{Quotas: []*cluster.Quota{{Name: "q", Limits: []*cluster.QuotaLimit{{Region: "global", CPU: &cpu}}}}})
		w.must(&cluster.UpsertNamespaces{Namespaces: []*cluster.Namespace{{Name: "x", Quota: "q"}}})
		w.node("n1", 0)
		w.run(service("j", 2, in("x")))
		w.agents()
		w.run(service("j", 2, in("x"), command("v1")))
		snap := w.agents()
		n := 0
		for _, a := range snap.AllocsByJob(nil, cluster.JobKey{Namespace: "x", ID: "j"}) {
			if !a.Terminal() && a.JobVersion == 1 {
				n++
			}
		}
		if n != 2 {
			t.Fatalf("%d allocations of the new version, want 2", n)
		}
	})
}

// TestChildrenWait: of a job's children no more run than it allows; the others wait for their ends, and say so.
func TestChildrenWait(t *testing.T) {
	inWorld(t, func(w *world) {
		w.node("n1", 0)
		parent := service("p", 1, batch, meta(cluster.MetaMaxParallel, "2"))
		parent.ParameterizedJob = &cluster.ParameterizedJobConfig{}
		w.must(&cluster.RegisterJob{Job: parent})
		var ids []string
		for range 5 {
			ids = append(ids, w.must(&cluster.DispatchJob{Namespace: "default", JobID: "p", EvalID: newID()}).JobID)
		}
		for done := 0; done < len(ids); done++ {
			snap := w.agents()
			children := snap.Summary(nil, cluster.JobKey{Namespace: "default", ID: "p"}).Children
			if want := int64(min(2, len(ids)-done)); children.Running != want {
				t.Fatalf("%+v, want %d running", *children, want)
			}
			if waiting := children.Pending; done == 0 {
				said := 0
				for _, e := range snap.OpenEvals(nil) {
					if e.Status == cluster.EvalStatusBlocked && e.StatusDescription == fmt.Sprintf(place.DescParallel, "p", 2, 2) {
						said++
					}
				}
				if waiting != 3 || said != 3 {
					t.Fatalf("%d wait and %d say why, want 3", waiting, said)
				}
			}
			for _, a := range snap.Allocs(nil, "") {
				if !a.Terminal() {
					w.say(a, cluster.AllocClientComplete, true)
					break
				}
			}
			w.settle()
			time.Sleep(time.Millisecond) // of the bubble: pauses between looks
		}
	})
}

// BenchmarkFairQueue gives out a backlog of 100,000 evaluations, of one namespace and of 1,000.
func BenchmarkFairQueue(b *testing.B) {
	for _, namespaces := range []int{1, 1000} {
		b.Run(fmt.Sprint("namespaces=", namespaces), func(b *testing.B) {
			var open []*cluster.Evaluation
			for i := range 100_000 {
				open = append(open, &cluster.Evaluation{
					ID: fmt.Sprint("e", i), Namespace: fmt.Sprint("n", i%namespaces), JobID: fmt.Sprint("j", i), Priority: 50,
					CreateIndex: uint64(i + 1), ModifyIndex: uint64(i + 1), Status: cluster.EvalStatusPending,
				})
			}
			for b.Loop() {
				q := newQueue()
				q.fair.capacity = map[string]float64{"cpu": 1e9}
				q.fair.job = func(cluster.JobKey) *cluster.Job {
					return &cluster.Job{TaskGroups: []*cluster.TaskGroup{{Count: 1, Tasks: []*cluster.Task{{Resources: &cluster.Resources{CPU: 100}}}}}}
				}
				q.sync(all(open), 0, false, 1)
				for q.ready.Len() > 0 {
					for _, i := range q.takeReady(maxBatch) {
						q.ended(i)
					}
				}
			}
		})
	}
}

// TestNothingBorrowedIsReclaimed: what a namespace has lent it takes back up to its quota; what it would borrow
// itself it does not take from others, who could take that back at once, and so on without end.
func TestNothingBorrowedIsReclaimed(t *testing.T) {
	inWorld(t, func(w *world) {
		w.preempting()
		w.node("n1", 4)
		for _, name := range []string{"a", "b", "c"} {
			w.must(&cluster.UpsertQuotas{Quotas: []*cluster.Quota{{Name: name, Limits: []*cluster.QuotaLimit{{
				Region: "global", Devices: []*cluster.QuotaDevice{{Name: "nvidia/gpu", Count: 2}},
			}}}}})
			w.must(&cluster.UpsertNamespaces{Namespaces: []*cluster.Namespace{{Name: name, Quota: name, Meta: map[string]string{cluster.MetaCohort: "c"}}}})
		}
		preemptible := func(j *cluster.Job) { j.TaskGroups[0].Preempt = &cluster.PreemptPolicy{Reclaim: true} }
		w.run(service("own", 1, batch, gpus(1), in("a"), preemptible))
		w.run(service("loan", 3, batch, gpus(1), in("b"), preemptible))
		evicted := func() (n int) {
			for _, a := range w.agents().AllocsByJob(nil, cluster.JobKey{Namespace: "b", ID: "loan"}) {
				if a.PreemptedByAllocation != "" {
					n++
				}
			}
			return n
		}
		if n := evicted(); n != 0 {
			t.Fatalf("%d preempted before anybody wants it back", n)
		}
		w.run(service("wide", 1, batch, gpus(2), in("a"), preemptible))
		if n := evicted(); n != 0 {
			t.Errorf("%d preempted for what a would borrow", n)
		}
		w.run(service("due", 1, batch, gpus(1), in("a"), preemptible))
		if n := evicted(); n != 1 {
			t.Errorf("%d preempted for what is a's own, want 1", n)
		}
	})
}
