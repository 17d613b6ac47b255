package scheduler

import (
	"cmp"
	"context"
	"slices"
	"sync"

	"github.com/rxvision/rxvision/cluster"
)

// queue orders the open evaluations of the state. It holds each of them once:
// waiting for its time, blocked until room appears, or ready. What is ready is
// given out by priority and age, one evaluation of a job at a time. It is as big
// as the state's table of open evaluations, never bigger.
type queue struct {
	mu       sync.Mutex
	items    map[string]*item // by evaluation ID
	jobs     map[cluster.JobKey]bool
	ready    []*item // sorted, the next one last
	paused   bool
	syncs    uint64
	changed  chan struct{} // closed and replaced when something may have become ready
	returned chan struct{} // closed and replaced when sync must look again
}

// item is one evaluation.
type item struct {
	eval     *cluster.Evaluation
	attempts int          // plans of it that were refused
	until    cluster.Time // not before
	tried    uint64       // a blocked one: the index up to which there is no room for it
	out      bool         // a worker has it; until it gives it back, eval does not change
	seen     uint64       // the sync that saw it last
}

func newQueue() *queue {
	return &queue{
		items: map[string]*item{}, jobs: map[cluster.JobKey]bool{},
		changed: make(chan struct{}), returned: make(chan struct{}),
	}
}

// counts are how many evaluations the queue holds.
type counts struct{ ready, waiting, blocked int }

// sync takes over what the state holds: its open evaluations, and capacity, the
// last index at which room appeared. It gives the next time at which an
// evaluation falls due, 0 for none.
func (q *queue) sync(open []*cluster.Evaluation, capacity uint64, paused bool, now cluster.Time) (next cluster.Time, c counts) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.paused = paused
	q.syncs++
	for _, e := range open {
		i := q.items[e.ID]
		if i == nil {
			i = &item{tried: e.SnapshotIndex}
			q.items[e.ID] = i
		}
		if !i.out && (i.eval == nil || i.eval.ModifyIndex != e.ModifyIndex) {
			i.eval = e
			i.until = max(i.until, e.WaitUntil)
		}
		i.seen = q.syncs
	}
	q.ready = q.ready[:0]
	for id, i := range q.items {
		switch {
		case i.out:
		case i.seen != q.syncs:
			delete(q.items, id)
		case i.eval.Status == cluster.EvalStatusBlocked && i.tried >= capacity:
			c.blocked++
		case i.until > now:
			c.waiting++
			if next == 0 || i.until < next {
				next = i.until
			}
		default:
			c.ready++
			q.ready = append(q.ready, i)
		}
	}
	slices.SortFunc(q.ready, func(a, b *item) int { return -before(a.eval, b.eval) })
	q.wake()
	return next, c
}

// forget drops what is known of blocked evaluations: the state was replaced.
func (q *queue) forget() {
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, i := range q.items {
		i.tried = 0
	}
}

// before orders evaluations: higher priority first, then those that wait for the
// end of what they replace (so that nobody else takes its place), then the oldest.
func before(a, b *cluster.Evaluation) int {
	replaces := func(e *cluster.Evaluation) int {
		if e.Status == cluster.EvalStatusBlocked && e.TriggeredBy == cluster.TriggerRollingUpdate {
			return 0
		}
		return 1
	}
	return cmp.Or(
		cmp.Compare(b.Priority, a.Priority),
		cmp.Compare(replaces(a), replaces(b)),
		cmp.Compare(a.CreateIndex, b.CreateIndex),
		cmp.Compare(a.ID, b.ID),
	)
}

func (q *queue) wake() {
	close(q.changed)
	q.changed = make(chan struct{})
}

// take waits for ready evaluations and gives at most max of them, each of
// another job. Each must be given back by done or again.
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
	if q.paused {
		return nil
	}
	var left []*item // of jobs that a worker has, in reverse order
	for len(q.ready) > 0 && len(batch) < max {
		i := q.ready[len(q.ready)-1]
		q.ready = q.ready[:len(q.ready)-1]
		if q.jobs[i.eval.JobKey()] {
			left = append(left, i)
			continue
		}
		q.jobs[i.eval.JobKey()], i.out = true, true
		batch = append(batch, i)
	}
	slices.Reverse(left)
	q.ready = append(q.ready, left...)
	return batch
}

// done gives an evaluation back that was answered; tried is the index up to which
// there is no room for it, if it stays blocked.
func (q *queue) done(i *item, tried uint64) {
	q.back(i, func() { i.tried, i.attempts = max(i.tried, tried), 0 })
}

// again gives an evaluation back to be planned anew, not before until.
func (q *queue) again(i *item, attempts int, until cluster.Time) {
	q.back(i, func() { i.tried, i.attempts, i.until = 0, attempts, until })
}

func (q *queue) back(i *item, change func()) {
	q.mu.Lock()
	defer q.mu.Unlock()
	change()
	i.out = false
	delete(q.jobs, i.eval.JobKey())
	close(q.returned)
	q.returned = make(chan struct{})
	q.wake()
}

// returns gives a channel that is closed when an evaluation is given back.
func (q *queue) returns() <-chan struct{} {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.returned
}
