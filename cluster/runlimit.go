package cluster

import "time"

// EventRunLimit is the type of the task event that says that an allocation has reached its
// group's MaxRunDuration. What ends so has failed and is not placed again by itself: it would run
// for as long once more.
const EventRunLimit = "Run Time Limit"

// MaxRunLimit bounds MaxRunDuration.
const MaxRunLimit = 10 * 365 * 24 * time.Hour

// maxPriority is the highest that a job may have.
const maxPriority = 100

// limited says whether the group's allocations are ended after some time.
func (g *TaskGroup) limited() bool { return g != nil && g.MaxRunDuration > 0 }

// RunLimited says whether some group of the job declares a run time.
func (j *Job) RunLimited() bool {
	for _, g := range j.TaskGroups {
		if g.limited() {
			return true
		}
	}
	return false
}

// RunBegan is when the first of the group's main tasks began to run, 0 when none has. Of
// a task that was started again it is the newest start.
func (g *TaskGroup) RunBegan(states map[string]*TaskState) (at Time) {
	for _, t := range g.Tasks {
		if s := states[t.Name]; t.Lifecycle == nil && s != nil && s.StartedAt != 0 && (at == 0 || s.StartedAt < at) {
			at = s.StartedAt
		}
	}
	return at
}

// EndTakes is how long the group's allocations take at most to end once they are told to:
// their delays and kill timeouts, one after the other.
func (g *TaskGroup) EndTakes() (d time.Duration) {
	if g.ShutdownDelay != nil {
		d = *g.ShutdownDelay
	}
	for _, t := range g.Tasks {
		d += t.ShutdownDelay + t.KillTimeout
	}
	return d
}

// RunTakes is how long an allocation of the group holds its place at most, from when its main
// tasks begin; 0 when nobody knows.
func (g *TaskGroup) RunTakes() time.Duration {
	if !g.limited() {
		return 0
	}
	return g.MaxRunDuration + g.EndTakes()
}

// OverLimit says whether the allocation was ended for having reached its group's MaxRunDuration.
func (a *Allocation) OverLimit() bool {
	for _, s := range a.Whole().TaskStates {
		if s == nil {
			continue
		}
		for _, e := range s.Events {
			if e.Type == EventRunLimit {
				return true
			}
		}
	}
	return false
}

// RunLimited says whether any job that is not stopped declares a run time.
func (s *Snapshot) RunLimited() (some bool) {
	q := newQuery(TableJobs, "limited_prefix", nil)
	s.txn.rows[q.table.number].by[q.by].from("", func(string, *set) bool {
		some = true
		return false
	})
	return some
}

// shortOfRoom says whether the evaluation waits for room on nodes: not for a quota, nor for
// others to leave what it has claims on.
func (e *Evaluation) shortOfRoom() bool {
	return e.Status == EvalStatusBlocked && len(e.FailedTGAllocs) > 0 && e.QuotaLimitReached == "" && len(e.Claims) == 0
}

// EvalsShortOfRoom calls fn with the blocked evaluations that wait for room on nodes, those of the highest
// priority first, then the oldest, until it returns false.
func (s *Snapshot) EvalsShortOfRoom(fn func(e *Evaluation) bool) {
	q := newQuery(TableEvals, "short_prefix", nil)
	rows := s.txn.rows[q.table.number]
	rows.by[q.by].from("", func(_ string, x *set) bool {
		return x.each(func(at slot) bool { return fn(rows.at(at).(*Evaluation)) })
	})
}
