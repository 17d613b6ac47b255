package scheduler

import (
	"cmp"
	"container/heap"
	"context"
	"sync"
	"time"

	"github.com/rxvision/rxvision/cluster"
)

// queue orders the open evaluations of the state. It holds each of them once:
// waiting for its time, blocked until room appears, or ready. What is ready is given out
// by priority, then by the shares of namespaces (fair.go), then by age, one evaluation of a job at a time.
//
// A look at the state (sync) costs what has changed since the last one, however much
// is open: it reads only the evaluations that were changed. So of one that has ended
// the queue does not hear; it is found out when a worker has taken it and gives it
// back by ended, or by a look at everything (sweep), which comes from time to time
// and when the queue has grown to twice of what was open at the last.
type queue struct {
	mu      sync.Mutex
	items   map[string]*item // by evaluation ID
	lines   map[cluster.JobKey]*line
	ready   pile[*class] // of what no worker has, the next one first
	fair    fair
	waiting pile[*item] // by time
	blocked pile[*item] // by the index up to which there is no room
	back    []*item     // given back since the last sync, which finds out where they belong
	out     int         // items that workers have

	seen     uint64 // changes up to this index are known
	capacity uint64 // the last index at which room appeared
	now      cluster.Time
	paused   bool
	unswept  bool         // everything must be looked at
	swept    cluster.Time // when it was
	open     int          // and how much there was
	sweeps   uint64

	changed  chan struct{} // closed and replaced when something may have become ready
	returned chan struct{} // closed and replaced when sync must look again
}

// When everything is looked at again.
const (
	sweepEvery = 10 * time.Second // if anything has changed
	sweepOver  = 1024             // items that the queue may hold beyond twice of what was open
)

// item is one evaluation.
type item struct {
	spot
	eval     *cluster.Evaluation
	attempts int                 // plans of it that were refused
	until    cluster.Time        // not before
	tried    uint64              // a blocked one: the index up to which there is no room for it
	in       *pile[*item]        // where it is; nil: a worker has it, or it was just given back
	out      bool                // a worker has it; until it gives it back, eval does not change
	fresh    *cluster.Evaluation // what sync has seen of it while it was out, nil for nothing
	sweep    uint64              // the newest that has seen it
	cost     float64             // counted for it while it is out, see tenant
}

// class is what is ready of one namespace at one rank: jobs that no worker has, the next one first.
type class struct {
	spot
	lines  pile[*line]
	rank   rank
	tenant *tenant
}

// rank is what goes before fairness: higher priority first, then what waits for the end of what it replaces, so
// that nobody else takes its place.
type rank struct {
	priority int
	replaces bool
}

func rankOf(e *cluster.Evaluation) rank {
	return rank{e.Priority, e.Status == cluster.EvalStatusBlocked && (e.TriggeredBy == cluster.TriggerRollingUpdate || len(e.Claims) > 0)}
}

// head is the next evaluation of the class.
func (c *class) head() *cluster.Evaluation { return c.lines.list[0].list[0].eval }

// line is what is ready of one job. It is there while it has items or a worker has one of them.
type line struct {
	spot
	pile[*item]
	job   cluster.JobKey
	out   bool   // a worker has an evaluation of the job: the line is in no class
	class *class // that it is in
}

func newLine(job cluster.JobKey) *line {
	return &line{job: job, pile: pile[*item]{before: func(a, b *item) bool { return before(a.eval, b.eval) < 0 }}}
}

func newQueue() *queue {
	return &queue{
		items: map[string]*item{}, lines: map[cluster.JobKey]*line{}, unswept: true,
		ready:   pile[*class]{before: func(a, b *class) bool { return a.goesBefore(b) }},
		fair:    fair{tenants: map[string]*tenant{}},
		waiting: pile[*item]{before: func(a, b *item) bool { return a.until < b.until }},
		blocked: pile[*item]{before: func(a, b *item) bool { return a.tried < b.tried }},
		changed: make(chan struct{}), returned: make(chan struct{}),
	}
}

// counts are how many evaluations the queue holds. Those that have ended count until
// that is found out.
type counts struct{ ready, waiting, blocked int }

// sync takes over what the state holds: its open evaluations, of which read gives
// those that were changed at an index or later, and capacity, the last index at which
// room appeared. It gives the next time at which the state should be looked at though
// it has not changed, 0 for none.
func (q *queue) sync(read func(from uint64) []*cluster.Evaluation, capacity uint64, paused bool, now cluster.Time) (next cluster.Time, c counts) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.capacity, q.paused, q.now = capacity, paused, now
	swept := q.unswept || now >= q.swept.Add(sweepEvery)
	if !swept {
		q.catchUp(read(q.seen + 1))
		swept = len(q.items) > 2*q.open+sweepOver
	}
	if swept {
		q.sweep(read(0))
	}
	if q.waiting.Len() > 0 {
		next = q.waiting.list[0].until
	}
	if at := q.swept.Add(sweepEvery); !swept && len(q.items) > 0 && (next == 0 || at < next) {
		next = at
	}
	if q.ready.Len() > 0 {
		q.wake()
	}
	c.waiting, c.blocked = q.waiting.Len(), q.blocked.Len()
	c.ready = len(q.items) - q.out - c.waiting - c.blocked
	return next, c
}

// catchUp takes over changes.
func (q *queue) catchUp(changed []*cluster.Evaluation) {
	for _, i := range q.back {
		q.add(i)
	}
	q.back = nil
	for _, e := range changed {
		q.see(e)
	}
	for q.blocked.Len() > 0 && q.blocked.list[0].tried < q.capacity {
		i := q.blocked.list[0]
		q.remove(i)
		q.add(i)
	}
	for q.waiting.Len() > 0 && q.waiting.list[0].until <= q.now {
		i := q.waiting.list[0]
		q.remove(i)
		q.add(i)
	}
}

// sweep takes over all open evaluations and drops what is not among them.
func (q *queue) sweep(open []*cluster.Evaluation) {
	q.unswept, q.swept, q.open = false, q.now, len(open)
	q.sweeps++
	q.catchUp(open)
	for id, i := range q.items {
		if !i.out && i.sweep != q.sweeps {
			q.remove(i)
			delete(q.items, id)
		}
	}
}

// see takes over an evaluation as it is now.
func (q *queue) see(e *cluster.Evaluation) {
	q.seen = max(q.seen, e.ModifyIndex)
	i := q.items[e.ID]
	if i == nil {
		i = &item{tried: e.SnapshotIndex}
		q.items[e.ID] = i
	}
	i.sweep = q.sweeps
	switch {
	case i.out:
		i.fresh = e
	case i.in == nil || i.eval.ModifyIndex != e.ModifyIndex:
		q.remove(i)
		i.set(e)
		q.add(i)
	}
}

func (i *item) set(e *cluster.Evaluation) {
	if i.eval == nil || i.eval.ModifyIndex != e.ModifyIndex {
		i.eval = e
		i.until = max(i.until, e.WaitUntil)
	}
}

// add puts an item where it belongs.
func (q *queue) add(i *item) {
	switch {
	case i.eval.Status == cluster.EvalStatusBlocked && i.tried >= q.capacity:
		i.in = &q.blocked
	case i.until > q.now:
		i.in = &q.waiting
	default:
		l := q.lines[i.eval.JobKey()]
		if l == nil {
			l = newLine(i.eval.JobKey())
			q.lines[l.job] = l
		}
		i.in = &l.pile
		heap.Push(i.in, i)
		q.moved(l)
		return
	}
	heap.Push(i.in, i)
}

// remove takes an item out of where it is, if it is anywhere.
func (q *queue) remove(i *item) {
	if i.in == nil {
		return
	}
	heap.Remove(i.in, i.at)
	if i.in != &q.waiting && i.in != &q.blocked {
		q.moved(q.lines[i.eval.JobKey()])
	}
	i.in = nil
}

// moved brings a line to its place after its items have changed.
func (q *queue) moved(l *line) {
	switch {
	case l.out:
	case l.Len() == 0:
		q.leave(l)
		delete(q.lines, l.job)
	case l.class != nil && l.class.rank == rankOf(l.list[0].eval):
		heap.Fix(&l.class.lines, l.at)
		heap.Fix(&q.ready, l.class.at)
	default:
		q.leave(l)
		q.enter(l)
	}
}

// leave takes a line out of its class, if it is in one.
func (q *queue) leave(l *line) {
	c := l.class
	if c == nil {
		return
	}
	heap.Remove(&c.lines, l.at)
	if l.class = nil; c.lines.Len() > 0 {
		heap.Fix(&q.ready, c.at)
		return
	}
	heap.Remove(&q.ready, c.at)
	delete(c.tenant.classes, c.rank)
}

// enter puts a line that has items into the class where it belongs.
func (q *queue) enter(l *line) {
	t, r := q.fair.tenant(l.job.Namespace), rankOf(l.list[0].eval)
	c := t.classes[r]
	if l.class = c; c != nil {
		heap.Push(&c.lines, l)
		heap.Fix(&q.ready, c.at)
		return
	}
	c = &class{rank: r, tenant: t, lines: pile[*line]{before: func(a, b *line) bool { return before(a.list[0].eval, b.list[0].eval) < 0 }}}
	l.class, t.classes[r] = c, c
	heap.Push(&c.lines, l)
	heap.Push(&q.ready, c)
}

// forget makes the next sync look at everything and drops what is known of blocked
// evaluations: the state was replaced.
func (q *queue) forget() {
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, i := range q.items {
		if i.tried = 0; i.in != nil { // else it comes back, or is about to be looked at
			q.remove(i)
			q.back = append(q.back, i)
		}
	}
	q.unswept, q.seen = true, 0
}

// before orders the evaluations of a namespace: by rank, then the oldest first.
func before(a, b *cluster.Evaluation) int {
	return cmp.Or(
		rankOf(a).compare(rankOf(b)),
		cmp.Compare(a.CreateIndex, b.CreateIndex),
		cmp.Compare(a.ID, b.ID),
	)
}

func (q *queue) wake() {
	close(q.changed)
	q.changed = make(chan struct{})
}

// take waits for ready evaluations and gives at most max of them, each of
// another job. Each must be given back by ended, done or again.
func (q *queue) take(ctx context.Context, max int) ([]*item, error) {
	for {
		q.mu.Lock()
		batch := q.takeReady(max)
		changed := q.changed
		q.mu.Unlock()
		if len(batch) > 0 {
			return batch, nil
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-changed:
		}
	}
}

func (q *queue) takeReady(max int) (batch []*item) {
	for !q.paused && q.ready.Len() > 0 && len(batch) < max {
		l := q.ready.list[0].lines.list[0]
		q.leave(l)
		i := heap.Pop(&l.pile).(*item)
		i.in, i.out, l.out = nil, true, true
		q.out++
		q.charge(i)
		batch = append(batch, i)
	}
	return batch
}

// ended gives an evaluation back that is open no more.
func (q *queue) ended(i *item) {
	q.giveBack(i, func() { i.tried, i.attempts = 0, 0 }, true)
}

// done gives an evaluation back that was answered and is still open; tried is the
// index up to which there is no room for it.
func (q *queue) done(i *item, tried uint64) {
	q.giveBack(i, func() { i.tried, i.attempts = max(i.tried, tried), 0 }, false)
}

// again gives an evaluation back to be planned anew, not before until.
func (q *queue) again(i *item, attempts int, until cluster.Time) {
	q.giveBack(i, func() { i.tried, i.attempts, i.until = 0, attempts, until }, false)
}

func (q *queue) giveBack(i *item, change func(), ended bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	change()
	i.out = false
	q.out--
	l := q.lines[i.eval.JobKey()]
	q.fair.tenant(l.job.Namespace).settled += i.cost
	if l.out = false; l.Len() > 0 {
		q.enter(l)
		q.wake()
	} else {
		delete(q.lines, l.job)
	}
	// One that was open in a look after it was taken may be so again, in a state that has
	// taken the place of the worker's: it stays until a worker finds that it is not.
	if ended && i.fresh == nil {
		delete(q.items, i.eval.ID)
		return
	}
	if i.fresh != nil {
		i.set(i.fresh)
		i.fresh = nil
	}
	q.back = append(q.back, i)
	close(q.returned)
	q.returned = make(chan struct{})
}

// returns gives a channel that is closed when sync must look again at an evaluation
// that was given back.
func (q *queue) returns() <-chan struct{} {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.returned
}

// pile is a heap whose elements know where they lie in it.
type pile[T interface{ lie(at int) }] struct {
	list   []T
	before func(a, b T) bool
}

// spot is the place of an element in its pile.
type spot struct{ at int }

func (s *spot) lie(at int) { s.at = at }

func (p *pile[T]) Len() int           { return len(p.list) }
func (p *pile[T]) Less(i, j int) bool { return p.before(p.list[i], p.list[j]) }

func (p *pile[T]) Swap(i, j int) {
	p.list[i], p.list[j] = p.list[j], p.list[i]
	p.list[i].lie(i)
	p.list[j].lie(j)
}

func (p *pile[T]) Push(x any) {
	x.(T).lie(len(p.list))
	p.list = append(p.list, x.(T))
}

func (p *pile[T]) Pop() any {
	last := len(p.list) - 1
	x := p.list[last]
	clear(p.list[last:])
	p.list = p.list[:last]
	return x
}
