package scheduler

import (
	"context"

	"github.com/rxvision/rxvision/cluster"
)

// Limits of one log entry with plans.
const (
	entryBytes = 1<<20 - 32<<10 // the log takes 1 MiB; the rest is for what surrounds the plans
	entryPlans = 512
)

// applier commits the plans of all workers, one log entry at a time. What
// arrives while an entry is being stored goes into the next one together. Each
// worker waits for its plans, so at most maxBatch of each are on their way.
type applier struct {
	*Scheduler
	in chan []*submission
}

// submission is a plan on its way.
type submission struct {
	plan   *cluster.Plan
	size   int
	answer chan outcome // takes one without blocking
}

// outcome is what became of a plan.
type outcome struct {
	cluster.PlanResult
	index uint64
	err   error
}

// whole says whether all of the plan was applied.
func (o *outcome) whole() bool { return o.err == nil && !o.Stale && len(o.Refused) == 0 }

// outcome waits for what becomes of the plan.
func (s *submission) outcome(ctx context.Context) (outcome, error) {
	select {
	case out := <-s.answer:
		return out, nil
	case <-ctx.Done():
		return outcome{}, ctx.Err()
	}
}

func newApplier(s *Scheduler) *applier {
	return &applier{Scheduler: s, in: make(chan []*submission, s.workers)}
}

func newSubmission(snap *cluster.Snapshot, p *cluster.Plan) *submission {
	return &submission{plan: p, size: snap.EntrySize(p), answer: make(chan outcome, 1)}
}

// submit hands plans over; each gets its answer on its channel.
func (a *applier) submit(ctx context.Context, plans []*submission) error {
	select {
	case a.in <- plans:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (a *applier) run(ctx context.Context) error {
	var pending []*submission
	for {
		if len(pending) == 0 {
			select {
			case <-ctx.Done():
				return ctx.Err()
			case pending = <-a.in:
			}
		}
		pending = a.drain(pending)
		n := entryOf(pending)
		a.commit(ctx, pending[:n])
		pending = pending[n:]
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
}

// drain adds what else has arrived.
func (a *applier) drain(pending []*submission) []*submission {
	for {
		select {
		case more := <-a.in:
			pending = append(pending, more...)
		default:
			return pending
		}
	}
}

// entryOf says how many plans go into the next entry: one at least, as it may be
// too big for any.
func entryOf(pending []*submission) int {
	size := 0
	for n, s := range pending {
		if size += s.size; n > 0 && (size > entryBytes || n == entryPlans) {
			return n
		}
	}
	return len(pending)
}

// commit stores one entry and answers its plans.
func (a *applier) commit(ctx context.Context, entry []*submission) {
	cmd := &cluster.ApplyPlans{}
	for _, s := range entry {
		cmd.Plans = append(cmd.Plans, s.plan)
	}
	res, err := a.apply(ctx, cmd)
	a.metrics.entries.Inc()
	for i, s := range entry {
		out := outcome{index: res.Index, err: err}
		if err == nil {
			out.PlanResult = res.Plans[i]
			a.metrics.count(s.plan, out.PlanResult)
		}
		s.answer <- out
	}
}
