package place

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/rxvision/rxvision/cluster"
)

// TestBackfillDelaysNobody lets random work come and go on random clusters: as long as everybody keeps to what he has
// declared, who is first in line begins by the time that was forecast for him, whoever is placed meanwhile.
func TestBackfillDelaysNobody(t *testing.T) {
	kept, backfilled := 0, 0
	for seed := range uint64(12) {
		b := &backfill{T: t, w: &world{}, rnd: rand.New(rand.NewPCG(seed, 3)), now: epoch, ends: map[string]cluster.Time{}}
		b.run()
		kept, backfilled = kept+b.kept, backfilled+b.backfilled
	}
	if kept < 20 || backfilled < 20 {
		t.Errorf("%d forecasts were kept, and %d allocations placed before who waited longer: the test shows less than it says", kept, backfilled)
	}
}

// backfill is a cluster in virtual time.
type backfill struct {
	*testing.T
	w     *world
	rnd   *rand.Rand
	now   cluster.Time
	jobs  int
	ids   int
	ends  map[string]cluster.Time // by allocation
	cache Cache

	first   string       // job that is first in line
	promise cluster.Time // when it begins, 0: nobody knows

	kept, backfilled int
}

func (b *backfill) run() {
	for i := range 2 + b.rnd.IntN(4) {
		l, err := parseLine(fmt.Sprintf("n%d gpu=A100 gpus=%d cpu=100000 memory=100000", i, 2+b.rnd.IntN(3)))
		if err != nil {
			b.Fatal(err)
		}
		b.w.nodes = append(b.w.nodes, l.node())
	}
	for range 120 {
		if b.rnd.IntN(2) == 0 {
			b.comes()
		}
		b.plan()
		b.foresee()
		next := b.now.Add(time.Duration(1+b.rnd.IntN(20)) * time.Minute)
		for _, end := range b.ends {
			next = min(next, max(end, b.now))
		}
		b.now = next
		for _, a := range b.w.allocs {
			if end, runs := b.ends[a.ID]; runs && end <= b.now {
				a.ClientStatus = cluster.AllocClientComplete
				delete(b.ends, a.ID)
			}
		}
	}
}

// comes registers a job. Those that wait and come after it are promised nothing any more.
func (b *backfill) comes() {
	b.jobs++
	id := fmt.Sprintf("job%d", b.jobs)
	group := fmt.Sprintf("group g count=%d", 1+b.rnd.IntN(3))
	if b.rnd.IntN(2) == 0 {
		group += " gang"
	}
	if b.rnd.IntN(6) > 0 {
		group += fmt.Sprintf(" limit=%dm", 5+b.rnd.IntN(120))
	}
	for _, text := range []string{
		fmt.Sprintf("job %s type=batch priority=%d", id, 40+10*b.rnd.IntN(3)), group, "task t kill_timeout=10s", fmt.Sprintf("device gpu count=%d", 1+b.rnd.IntN(2)),
	} {
		l, err := parseLine(text)
		if err != nil {
			b.Fatal(err)
		}
		b.w.version(l, 1)
	}
	e := &cluster.Evaluation{
		ID: "of-" + id, Namespace: cluster.DefaultNamespace, JobID: id, Status: cluster.EvalStatusBlocked,
		CreateIndex: uint64(b.jobs), FailedTGAllocs: map[string]*cluster.AllocMetric{"g": {}},
	}
	e.Priority = b.w.Job(nil, e.JobKey()).Priority
	b.w.short = append(b.w.short, e)
	slices.SortFunc(b.w.short, func(x, y *cluster.Evaluation) int {
		return cmp.Or(cmp.Compare(y.Priority, x.Priority), cmp.Compare(x.CreateIndex, y.CreateIndex))
	})
	if b.w.short[0].JobID != b.first {
		b.first = ""
	}
}

// plan answers all that waits, in order, on one view.
func (b *backfill) plan() {
	v := b.cache.View(b.w)
	var placed []*cluster.Allocation
	var left []*cluster.Evaluation
	for i, e := range b.w.short {
		job := b.w.Job(nil, e.JobKey())
		r := v.Plan(Input{Job: job, Eval: e, Now: b.now, NewID: func() string { b.ids++; return fmt.Sprint("id", b.ids) }})
		if n := len(r.Plan.Place); n > 0 && i > 0 && len(left) > 0 {
			b.backfilled += n
		}
		if e.JobID == b.first && len(r.Plan.Place) > 0 {
			if b.promise != 0 {
				b.kept++
			}
			b.first = ""
		}
		for _, a := range r.Plan.Place {
			a.CreateIndex, a.ClientStatus = uint64(b.ids), cluster.AllocClientRunning
			a.TaskStates = map[string]*cluster.TaskState{"t": {State: cluster.TaskStateRunning, StartedAt: b.now}}
			most := job.TaskGroups[0].RunTakes()
			if most == 0 {
				most = 3 * time.Hour // which nobody knows
			}
			b.ends[a.ID] = b.now.Add(most - time.Duration(b.rnd.IntN(2))*most/time.Duration(2+b.rnd.IntN(3)))
			placed = append(placed, a)
		}
		if r.Queued["g"] > 0 {
			left = append(left, e)
		}
	}
	b.w.allocs, b.w.short = append(b.w.allocs, placed...), left
}

// foresee compares what is forecast for the first in line with what was.
func (b *backfill) foresee() {
	if len(b.w.short) == 0 {
		b.first = ""
		return
	}
	e := b.w.short[0]
	if b.first == e.JobID && b.promise != 0 && b.now > b.promise {
		b.Fatalf("%s was to begin at %s; now it is %s", e.JobID, time.Duration(b.promise-epoch), time.Duration(b.now-epoch))
	}
	f := b.cache.View(b.w).Forecast(Input{Job: b.w.Job(nil, e.JobKey()), Eval: e, Now: b.now})
	switch {
	case f.Known && len(f.Awaits) == 0:
		b.Fatalf("%s could begin at once on %v, but was not placed", e.JobID, f.Places)
	case b.first == e.JobID && b.promise != 0 && (!f.Known || f.Start > b.promise):
		b.Fatalf("%s was to begin at %s, and now at %s (%s)", e.JobID, time.Duration(b.promise-epoch), time.Duration(f.Start-epoch), f.Why)
	}
	b.first, b.promise = e.JobID, f.Start
}
