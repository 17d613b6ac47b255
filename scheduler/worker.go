package scheduler

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/scheduler/place"
)

// Limits of planning.
const (
	maxBatch    = 64        // evaluations that are planned on one snapshot
	maxAttempts = 5         // refused plans of one evaluation
	planBytes   = 256 << 10 // of one plan; a bigger change takes several, one after the other
	partsAtOnce = 4         // of a bigger change
	planParts   = 64        // that a bigger change is cut into; after them it is planned again
)

// followUpDelay is how long after an evaluation failed its job is looked at again.
const followUpDelay = time.Minute

// follow keeps the queue in step with the state.
func (s *Scheduler) follow(ctx context.Context, q *queue) error {
	var state <-chan struct{} // closed when its state is replaced
	return s.watchState(ctx, 0, func(snap *cluster.Snapshot, ws cluster.WatchSet) cluster.Time {
		if state != snap.Abandoned() {
			state = snap.Abandoned()
			q.forget()
		}
		ws.Add(q.returns())
		capacity := snap.Index(ws, cluster.IndexCapacity)
		paused := snap.SchedulerConfig(ws).PauseEvalBroker
		open := func(from uint64) []*cluster.Evaluation { return snap.OpenEvalsFrom(ws, from) }
		q.weigh(snap, now())
		next, c := q.sync(open, capacity, paused, now())
		s.metrics.queued(c)
		return next
	})
}

// worker answers evaluations.
type worker struct {
	*Scheduler
	queue   *queue
	applier *applier
	cache   place.Cache
}

func (w *worker) run(ctx context.Context) error {
	for {
		batch, err := w.queue.take(ctx, maxBatch)
		if err != nil {
			return err
		}
		if err := w.answer(ctx, batch); err != nil {
			return err
		}
	}
}

// answer plans a batch on one snapshot, so that the plans do not meet each
// other, commits them together and deals with what was refused. Every item is
// given back to the queue, unless ctx ends.
func (w *worker) answer(ctx context.Context, batch []*item) error {
	index := uint64(0)
	for _, i := range batch {
		index = max(index, i.eval.ModifyIndex)
	}
	snap, err := w.store.SnapshotMinIndex(ctx, index)
	if err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		w.log.Warn("no snapshot to plan on; trying again", "index", index, "in", maxBackoff, "error", err)
		for _, i := range batch {
			w.queue.again(i, i.attempts, now().Add(maxBackoff))
		}
		return nil
	}
	var view *place.View // of a batch with something to plan
	var items []*item
	var results []*place.Result
	var plans []*submission
	for _, i := range batch {
		eval := snap.Eval(nil, i.eval.ID)
		if eval == nil || eval.Terminal() {
			w.queue.ended(i)
			continue
		}
		if view == nil {
			w.cache.Expect(w.mix.Load())
			view = w.cache.View(snap)
		}
		r := w.plan(view, snap, eval)
		if unchanged(eval, r) {
			w.queue.done(i, r.Eval.SnapshotIndex)
			continue
		}
		items, results, plans = append(items, i), append(results, r), append(plans, newSubmission(snap, r.Parts()[0]))
	}
	if len(plans) == 0 {
		return nil
	}
	if err := w.applier.submit(ctx, plans); err != nil {
		return err
	}
	var long []func() error // after the others, which need not wait for them
	for n, p := range plans {
		out, err := p.outcome(ctx)
		switch r := results[n]; {
		case err != nil:
			return err
		case len(r.Earlier) > 0:
			long = append(long, func() error { return w.goOn(ctx, snap, items[n], r, out) })
		default:
			if err := w.settle(ctx, items[n], r, out); err != nil {
				return err
			}
		}
	}
	for _, rest := range long {
		if err := rest(); err != nil {
			return err
		}
	}
	return nil
}

// goOn commits the further parts of an answer, as long as all are applied whole; Earlier then holds those that are still
// to come, for settle. The last one answers the evaluation and goes alone; of the others, each of which is good without those
// behind it, several share an entry.
func (w *worker) goOn(ctx context.Context, snap *cluster.Snapshot, i *item, r *place.Result, out outcome) error {
	rest := r.Parts()[1:]
	for len(rest) > 0 && out.whole() {
		n := max(min(len(rest)-1, partsAtOnce), 1)
		var plans []*submission
		for _, p := range rest[:n] {
			plans = append(plans, newSubmission(snap, p))
		}
		rest = rest[n:]
		if err := w.applier.submit(ctx, plans); err != nil {
			return err
		}
		for _, p := range plans {
			o, err := p.outcome(ctx)
			if err != nil {
				return err
			}
			if out.whole() {
				out = o
			}
		}
	}
	r.Earlier = rest[:max(len(rest)-1, 0)]
	return w.settle(ctx, i, r, out)
}

func (w *worker) plan(view *place.View, snap *cluster.Snapshot, eval *cluster.Evaluation) *place.Result {
	start := time.Now()
	r := planOne(view, snap, eval, cluster.TimeOf(start), newID, planParts)
	took := time.Since(start)
	w.metrics.planned.Observe(took.Seconds())
	for _, m := range r.Failed {
		m.AllocationTime = took
	}
	parts, placed := r.Parts(), 0
	for _, p := range parts {
		placed += len(p.Place)
	}
	for _, p := range parts {
		for _, a := range p.Place {
			if a.Metrics != nil && a.CreateIndex == 0 {
				a.Metrics.AllocationTime = took / time.Duration(placed)
			}
		}
	}
	return r
}

// planOne answers one evaluation of a snapshot.
func planOne(view *place.View, snap *cluster.Snapshot, eval *cluster.Evaluation, now cluster.Time, newID func() string, parts int) *place.Result {
	return view.Plan(place.Input{Job: snap.Job(nil, eval.JobKey()), Eval: eval, Now: now, NewID: newID, MaxBytes: planBytes, MaxParts: parts})
}

// unchanged says whether a blocked evaluation is blocked as before: as many
// allocations wait, for the same kinds of reasons. Then nothing is written, lest
// each end of an allocation rewrites every blocked evaluation for its counts.
func unchanged(eval *cluster.Evaluation, r *place.Result) bool {
	return eval.Status == cluster.EvalStatusBlocked && r.Eval.Status == cluster.EvalStatusBlocked &&
		eval.StatusDescription == r.Eval.StatusDescription && eval.QuotaLimitReached == r.Eval.QuotaLimitReached && r.Empty() && len(r.Plan.Evals) == 1 && slices.Equal(eval.Claims, r.Eval.Claims) &&
		maps.Equal(eval.QueuedAllocations, r.Queued) && maps.EqualFunc(eval.FailedTGAllocs, r.Failed, sameReasons)
}

func sameReasons(a, b *cluster.AllocMetric) bool {
	sameKind := func(int, int) bool { return true }
	return (a.NodesEvaluated == 0) == (b.NodesEvaluated == 0) &&
		maps.EqualFunc(a.ConstraintFiltered, b.ConstraintFiltered, sameKind) &&
		maps.EqualFunc(a.DimensionExhausted, b.DimensionExhausted, sameKind) &&
		slices.EqualFunc(a.QuotaExhausted, b.QuotaExhausted, func(x, y string) bool {
			x, _, _ = strings.Cut(x, "(") // the amounts behind it change all the time
			y, _, _ = strings.Cut(y, "(")
			return x == y
		})
}

// settle gives an item back by what became of its plan.
func (w *worker) settle(ctx context.Context, i *item, r *place.Result, out outcome) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	log := w.log.With("eval", i.eval.ID, "job", i.eval.JobID)
	switch {
	case out.err != nil:
		log.Error("a plan could not be stored", "error", out.err)
	case len(out.Refused) > 0:
		w.metrics.refused.Add(float64(len(out.Refused)))
		log.Debug("a plan was refused in part", "nodes", out.Refused, "attempt", i.attempts+1)
	default:
		log.Debug("evaluation answered", "placed", len(r.Plan.Place), "stopped", len(r.Plan.Stop), "failed", len(r.Failed), "index", out.index)
	}
	if why := w.queue.settle(i, r, out); why != "" {
		return w.fail(ctx, i, why)
	}
	return nil
}

// settle gives an item back by what became of its plan, unless its evaluation
// must fail: then it says why, and the caller gives the item back.
func (q *queue) settle(i *item, r *place.Result, out outcome) (why string) {
	switch {
	case out.err != nil:
		return fmt.Sprintf("the plan could not be stored: %v", out.err)
	case out.Stale:
		q.again(i, i.attempts, 0) // gone or changed meanwhile: the state says what to do
	case len(out.Refused) > 0:
		if i.attempts+1 >= maxAttempts {
			return fmt.Sprintf("maximum attempts reached (%d)", maxAttempts)
		}
		q.again(i, i.attempts+1, 0)
	case r.More, len(r.Earlier) > 0:
		q.again(i, 0, 0)
	case r.Eval.Status == cluster.EvalStatusBlocked:
		q.done(i, r.Eval.SnapshotIndex)
	default:
		q.ended(i)
	}
	return ""
}

// fail gives an evaluation up and lets another one try later.
func (w *worker) fail(ctx context.Context, i *item, why string) error {
	w.metrics.failed.Inc()
	e := i.eval
	_, err := w.apply(ctx, failure(e, why, now(), newID))
	switch {
	case err == nil:
		w.queue.ended(i)
	case ctx.Err() == nil:
		w.log.Error("a failed evaluation could not be stored; trying again", "eval", e.ID, "job", e.JobID, "in", maxBackoff, "error", err)
		w.queue.again(i, 0, now().Add(maxBackoff))
	}
	return ctx.Err()
}

// failure ends an evaluation for a reason and creates the one that follows it.
func failure(old *cluster.Evaluation, why string, now cluster.Time, newID func() string) *cluster.UpdateEvals {
	e := *old
	next := &cluster.Evaluation{
		ID: newID(), Namespace: e.Namespace, Priority: e.Priority, Type: e.Type, JobID: e.JobID, JobModifyIndex: e.JobModifyIndex,
		TriggeredBy: cluster.TriggerFailedFollowUp, Status: cluster.EvalStatusPending, PreviousEval: e.ID,
		StatusDescription: "created because an evaluation of the job failed",
		Wait:              followUpDelay, WaitUntil: now.Add(followUpDelay),
	}
	e.Status, e.StatusDescription, e.NextEval = cluster.EvalStatusFailed, why, next.ID
	return &cluster.UpdateEvals{Evals: []*cluster.Evaluation{&e, next}}
}
