package scheduler

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/rxvision/rxvision/cluster"
)

// all gives a state's open evaluations as sync reads them.
func all(open []*cluster.Evaluation) func(uint64) []*cluster.Evaluation {
	return func(from uint64) (out []*cluster.Evaluation) {
		for _, e := range open {
			if e.ModifyIndex >= from {
				out = append(out, e)
			}
		}
		return out
	}
}

func TestQueueOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := newQueue()
		eval := func(id, job string, priority int, create uint64, change ...func(*cluster.Evaluation)) *cluster.Evaluation {
			e := &cluster.Evaluation{ID: id, JobID: job, Priority: priority, CreateIndex: create, ModifyIndex: create, Status: cluster.EvalStatusPending}
			for _, c := range change {
				c(e)
			}
			return e
		}
		blocked := func(e *cluster.Evaluation) { e.Status, e.SnapshotIndex = cluster.EvalStatusBlocked, 50 }
		later := func(e *cluster.Evaluation) { e.WaitUntil = 1000 }
		replacing := func(e *cluster.Evaluation) { blocked(e); e.TriggeredBy = cluster.TriggerRollingUpdate }
		open := []*cluster.Evaluation{
			eval("old", "a", 50, 1), eval("same-job", "a", 50, 2), eval("high", "b", 90, 9), eval("later", "c", 99, 1, later),
			eval("blocked", "d", 50, 3, blocked), eval("young", "e", 50, 8), eval("replacing", "f", 50, 9, replacing),
		}
		ids := func(batch []*item) string {
			var out []string
			for _, i := range batch {
				out = append(out, i.eval.ID)
			}
			return strings.Join(out, " ")
		}
		next, c := q.sync(all(open), 50, false, 10)
		if next != 1000 || c != (counts{ready: 4, waiting: 1, blocked: 2}) {
			t.Fatalf("next %d, counts %+v", next, c)
		}
		first := q.takeReady(10)
		if got := ids(first); got != "high old young" {
			t.Fatalf("taken: %s", got)
		}
		q.sync(all(open), 51, false, 1000)
		second := q.takeReady(10)
		if got := ids(second); got != "later replacing blocked" {
			t.Fatalf("with room, and its time come: %s", got)
		}
		q.done(first[1], 0) // of job a: the other of that job may go
		if got := ids(q.takeReady(10)); got != "same-job" {
			t.Fatalf("after the first of the job: %s", got)
		}
		q.done(second[2], 51)
		q.sync(all(nil), 51, false, 1000)
		if got := ids(q.takeReady(10)); got != "" {
			t.Fatalf("tried in vain, yet given out: %s", got)
		}
		q.sync(all(nil), 52, true, 1000)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := q.take(ctx, 1); !errors.Is(err, context.Canceled) {
			t.Fatalf("take after the end: %v", err)
		}
	})
}

// model is a queue that looks at everything each time.
type model struct {
	items    map[string]*modelItem
	capacity uint64
	now      cluster.Time
}

type modelItem struct {
	eval     *cluster.Evaluation
	until    cluster.Time
	tried    uint64
	attempts int
	out      bool
}

func (m *model) sync(open map[string]*cluster.Evaluation, capacity uint64, now cluster.Time) {
	m.capacity, m.now = capacity, now
	for id, e := range open {
		i := m.items[id]
		if i == nil {
			i = &modelItem{tried: e.SnapshotIndex}
			m.items[id] = i
		}
		if !i.out && (i.eval == nil || i.eval.ModifyIndex != e.ModifyIndex) {
			i.eval, i.until = e, max(i.until, e.WaitUntil)
		}
	}
	maps.DeleteFunc(m.items, func(id string, i *modelItem) bool { return !i.out && open[id] == nil })
}

func (m *model) blocked(i *modelItem) bool {
	return i.eval.Status == cluster.EvalStatusBlocked && i.tried >= m.capacity
}

// ready are the evaluations that may be given out, the next one first, and how many there are of each kind.
func (m *model) ready() (ids []string, c counts) {
	var list []*modelItem
	busy := map[cluster.JobKey]bool{}
	for _, i := range m.items {
		switch {
		case i.out:
			busy[i.eval.JobKey()] = true
		case m.blocked(i):
			c.blocked++
		case i.until > m.now:
			c.waiting++
		default:
			c.ready++
			list = append(list, i)
		}
	}
	slices.SortFunc(list, func(a, b *modelItem) int { return before(a.eval, b.eval) })
	for _, i := range list {
		if !busy[i.eval.JobKey()] {
			busy[i.eval.JobKey()] = true
			ids = append(ids, i.eval.ID)
		}
	}
	return ids, c
}

// TestQueueAgainstModel drives the queue and one that looks at everything with the
// same random changes, ends, room, time, takes and returns: both give out the same
// in the same order. What has ended unseen the queue may give out besides, once.
func TestQueueAgainstModel(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	statuses := []string{cluster.EvalStatusPending, cluster.EvalStatusPending, cluster.EvalStatusBlocked}
	triggers := []string{cluster.TriggerJobRegister, cluster.TriggerRollingUpdate}
	given, unseen := 0, 0
	for range 10 {
		q, m := newQueue(), &model{items: map[string]*modelItem{}}
		open := map[string]*cluster.Evaluation{} // the state
		out := map[string]*item{}
		index, capacity, now, made := uint64(1), uint64(0), cluster.Time(1), 0
		read := func(from uint64) (news []*cluster.Evaluation) {
			for _, e := range open {
				if e.ModifyIndex >= from {
					news = append(news, e)
				}
			}
			slices.SortFunc(news, func(a, b *cluster.Evaluation) int { return int(a.ModifyIndex) - int(b.ModifyIndex) })
			return news
		}
		put := func(e cluster.Evaluation) {
			index++
			e.ModifyIndex, e.Status = index, statuses[r.IntN(len(statuses))]
			e.TriggeredBy = triggers[r.IntN(len(triggers))]
			if r.IntN(4) == 0 {
				e.WaitUntil = now + cluster.Time(r.IntN(40))
			}
			if r.IntN(3) == 0 {
				e.SnapshotIndex = index - 1
			}
			open[e.ID] = &e
		}
		some := func() string {
			for {
				if id := fmt.Sprint("e", 1+r.IntN(made)); open[id] != nil {
					return id
				}
			}
		}
		crowd := 10 + r.IntN(2000) // enough for the queue to grow to its bound
		for range 400 {
			switch r.IntN(12) {
			case 0, 1, 2:
				for range 1 + r.IntN(crowd/100+1) {
					made++
					put(cluster.Evaluation{ID: fmt.Sprint("e", made), JobID: fmt.Sprint("j", r.IntN(crowd/3)), Priority: r.IntN(4), CreateIndex: index})
				}
			case 3, 4:
				if len(open) > 0 {
					put(*open[some()])
				}
			case 5, 6:
				for range r.IntN(len(open)/4 + 1) {
					delete(open, some()) // also of those that are out
				}
				index++
			case 7:
				index++
				capacity = index
			case 8:
				now += cluster.Time(r.IntN(30))
				if r.IntN(10) == 0 {
					now = now.Add(sweepEvery)
				}
			case 9: // another state, in which older evaluations may be open, and others not
				if r.IntN(10) == 0 {
					q.forget()
					for id, e := range open {
						if c := *e; r.IntN(2) == 0 {
							delete(open, id)
						} else if r.IntN(2) == 0 {
							c.ModifyIndex -= min(c.ModifyIndex, uint64(r.IntN(5)))
							open[id] = &c
						}
					}
					for _, i := range m.items {
						i.tried = 0
					}
				}
			default: // one that is out comes back
				ids := slices.Sorted(maps.Keys(out))
				if len(ids) == 0 {
					continue
				}
				id := ids[r.IntN(len(ids))]
				i, mi := out[id], m.items[id]
				delete(out, id)
				mi.out = false
				index++
				switch how := r.IntN(4); {
				case open[id] == nil, how == 0:
					delete(open, id)
					q.ended(i)
				case how == 1:
					tried := index - uint64(r.IntN(4))
					q.done(i, tried)
					mi.tried, mi.attempts = max(mi.tried, tried), 0
				default:
					until := []cluster.Time{0, now + cluster.Time(r.IntN(30))}[r.IntN(2)]
					q.again(i, i.attempts+1, until)
					mi.tried, mi.attempts, mi.until = 0, mi.attempts+1, until
				}
			}
			next, _ := q.sync(read, capacity, false, now)
			m.sync(open, capacity, now)
			if next != 0 && next <= now {
				t.Fatalf("at %d the queue asks for a look at %d", now, next)
			}
			for n := r.IntN(4); n > 0; {
				want, _ := m.ready()
				batch := q.takeReady(1)
				if len(batch) == 0 {
					if len(want) > 0 {
						t.Fatalf("nothing is ready, want %v", want)
					}
					break
				}
				i := batch[0]
				if open[i.eval.ID] == nil {
					unseen++
					q.ended(i)
					continue
				}
				if len(want) == 0 || want[0] != i.eval.ID || i.eval.ModifyIndex != open[i.eval.ID].ModifyIndex || i.attempts != m.items[i.eval.ID].attempts {
					t.Fatalf("given out %+v after %d attempts, want the first of %v", i.eval, i.attempts, want)
				}
				out[i.eval.ID], m.items[i.eval.ID].out = i, true
				given++
				n--
			}
		}
		// What is gone unseen stops counting when all is quiet.
		next, _ := q.sync(read, capacity, false, now)
		for n := 0; next != 0; n++ {
			if n > 100 {
				t.Fatal("the queue asks for ever to be looked at")
			}
			now = next
			next, _ = q.sync(read, capacity, false, now)
		}
		m.sync(open, capacity, now)
		_, got := q.sync(read, capacity, false, now.Add(sweepEvery))
		m.now = now.Add(sweepEvery)
		if _, want := m.ready(); got != want {
			t.Fatalf("counts %+v, want %+v", got, want)
		}
	}
	t.Logf("%d evaluations were given out, %d that had ended", given, unseen)
	if given == 0 || unseen == 0 {
		t.Error("it was too quiet")
	}
}

// TestQueueIsBounded: evaluations that come, block and end unseen do not stay, though
// no time passes.
func TestQueueIsBounded(t *testing.T) {
	q := newQueue()
	var open []*cluster.Evaluation
	looked := 0
	for n := range 20 * sweepOver {
		e := &cluster.Evaluation{ID: fmt.Sprint(n), JobID: fmt.Sprint(n), ModifyIndex: uint64(n + 1), Status: cluster.EvalStatusBlocked}
		if open = append(open, e); len(open) > 10 {
			open = open[1:]
		}
		q.sync(func(from uint64) []*cluster.Evaluation {
			if from == 0 {
				looked++
			}
			return all(open)(from)
		}, 0, false, 1)
		if len(q.items) > 2*len(open)+sweepOver {
			t.Fatalf("the queue holds %d of %d", len(q.items), len(open))
		}
	}
	if looked > 21 {
		t.Errorf("everything was looked at %d times", looked)
	}
}

// TestQueueOfOneJob: however many evaluations of one job there are, each take costs
// the same.
func TestQueueOfOneJob(t *testing.T) {
	const many = 20_000
	q := newQueue()
	var open []*cluster.Evaluation
	for n := range many {
		open = append(open, &cluster.Evaluation{ID: fmt.Sprintf("%06d", n), JobID: "j", CreateIndex: uint64(n + 1), ModifyIndex: uint64(n + 1), Status: cluster.EvalStatusPending})
	}
	q.sync(all(open), 0, false, 1)
	for n := range many {
		batch := q.takeReady(maxBatch)
		if len(batch) != 1 || batch[0].eval != open[n] {
			t.Fatalf("take %d gave %d evaluations", n, len(batch))
		}
		if more := q.takeReady(maxBatch); more != nil {
			t.Fatal("two workers have an evaluation of the job")
		}
		q.ended(batch[0])
	}
	if len(q.items)+len(q.lines)+q.ready.Len() > 0 {
		t.Fatalf("%d items and %d lines are left", len(q.items), len(q.lines))
	}
}

// TestPriorityHoldsAcrossABacklog: of 100,000 evaluations that came in any order the highest priority goes first, of
// equal ones the oldest, whatever comes and is given back meanwhile.
func TestPriorityHoldsAcrossABacklog(t *testing.T) {
	const backlog, more = 100_000, 1000
	rnd := rand.New(rand.NewPCG(1, 2))
	var open []*cluster.Evaluation
	add := func(n int) {
		for range n {
			i := uint64(len(open) + 1)
			open = append(open, &cluster.Evaluation{
				ID: fmt.Sprint("e", i), Namespace: "n", JobID: fmt.Sprint("j", i), Priority: 10 * (1 + rnd.IntN(10)),
				CreateIndex: i, ModifyIndex: i, Status: cluster.EvalStatusPending,
			})
		}
	}
	read := func(from uint64) []*cluster.Evaluation { return open[max(from, 1)-1:] } // by its last change: number i has index i
	add(backlog)
	q := newQueue()
	q.sync(read, 0, false, 1)
	var last *cluster.Evaluation
	for taken := 0; taken < backlog+more; {
		if taken > backlog/2 && len(open) == backlog {
			add(more)
			q.sync(read, 0, false, 1)
			last = nil // those may go before
		}
		batch := q.takeReady(maxBatch)
		if len(batch) == 0 {
			t.Fatalf("nothing more after %d of %d", taken, backlog+more)
		}
		for _, i := range batch {
			if e := i.eval; last != nil && (e.Priority > last.Priority || e.Priority == last.Priority && e.CreateIndex < last.CreateIndex) {
				t.Fatalf("%s of priority %d comes after %s of priority %d", e.ID, e.Priority, last.ID, last.Priority)
			}
			last = i.eval
			q.ended(i)
		}
		taken += len(batch)
	}
}

// BenchmarkQueue is a look at a state with 50,000 open evaluations, of which one has changed.
func BenchmarkQueue(b *testing.B) {
	const open = 50_000
	s := newMemStore(b)
	s.check = false
	eval := func(n int) *cluster.Evaluation {
		return &cluster.Evaluation{
			ID: fmt.Sprintf("%08d", n), Namespace: "default", JobID: fmt.Sprint("job", n%(open/2)), Priority: n % 100,
			TriggeredBy: cluster.TriggerAllocFailure, Status: []string{cluster.EvalStatusPending, cluster.EvalStatusBlocked}[n%2],
		}
	}
	for n := 0; n < open; n += 1000 {
		cmd := &cluster.UpdateEvals{}
		for i := range 1000 {
			cmd.Evals = append(cmd.Evals, eval(n+i))
		}
		s.must(cmd)
	}
	q := newQueue()
	look := func() counts {
		snap, ws := s.State().Snapshot(), make(cluster.WatchSet)
		_, c := q.sync(func(from uint64) []*cluster.Evaluation { return snap.OpenEvalsFrom(ws, from) }, 0, false, now())
		return c
	}
	look()
	b.ResetTimer()
	for n := range b.N {
		s.must(&cluster.UpdateEvals{Evals: []*cluster.Evaluation{eval(n * 7919 % open)}})
		if c := look(); c.ready+c.blocked != open {
			b.Fatal(c)
		}
	}
}
