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
// arrives while an entry is being stored goes into the next one together.
type applier struct {
	*Scheduler
	in chan *submission
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

func newApplier(s *Scheduler) *applier {
	return &applier{Scheduler: s, in: make(chan *submission, s.workers*maxBatch)}
}

// submit hands a plan over; the answer comes on the channel.
func (a *applier) submit(ctx context.Context, p *cluster.Plan) (<-chan outcome, error) {
	s := &submission{plan: p, size: len(cluster.Marshal(p)), answer: make(chan outcome, 1)}
	select {
	case a.in <- s:
		return s.answer, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (a *applier) run(ctx context.Context) error {
	var next *submission // did not fit into the entry before
	for {
		if next == nil {
			select {
			case <-ctx.Done():
				return ctx.Err()
			case next = <-a.in:
			}
		}
		entry := []*submission{next}
		size := next.size
		next = nil
		for next == nil && len(entry) < entryPlans {
			select {
			case s := <-a.in:
				if size += s.size; size > entryBytes {
					next = s
					continue
				}
				entry = append(entry, s)
				continue
			default:
			}
			break
		}
		a.commit(ctx, entry)
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
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
