package cluster

// MaxAnswered bounds the evaluations that a plan answers besides its own.
const MaxAnswered = 256

// AnsweredBy begins the description of an evaluation that the plan of another one
// has answered; that one's ID follows.
const AnsweredBy = "answered by evaluation "

// applyPlans commits plans one after the other.
func (t *tx) applyPlans(c *ApplyPlans) (results []PlanResult) {
	for _, p := range c.Plans {
		res := t.applyPlan(p)
		if !res.Stale && len(res.Refused) == 0 {
			t.answerOthers(p)
		}
		results = append(results, res)
	}
	return results
}

// answerOthers completes the other evaluations of the job that a plan answers, with
// what it says of its own, so that a client that waits for one of them learns how its
// change fares. One that has changed since the plan's snapshot asks for something that
// the plan may not know of, and stays.
func (t *tx) answerOthers(p *Plan) {
	e := t.Eval(nil, p.EvalID)
	if e == nil || e.ModifyIndex != t.index { // the plan has left its own evaluation open
		return
	}
	blocked := e.BlockedEval
	switch e.Status {
	case EvalStatusComplete:
	case EvalStatusBlocked:
		blocked = e.ID
	default:
		return
	}
	var answered []*Evaluation
	for _, id := range p.Answers[:min(len(p.Answers), MaxAnswered)] {
		other := t.Eval(nil, id)
		if other == nil || other.ID == e.ID || other.JobKey() != e.JobKey() || !other.Answerable() || other.ModifyIndex > e.SnapshotIndex {
			continue
		}
		c := *other
		c.Status, c.StatusDescription, c.BlockedEval = EvalStatusComplete, AnsweredBy+e.ID, blocked
		c.QueuedAllocations, c.FailedTGAllocs, c.SnapshotIndex = e.QueuedAllocations, e.FailedTGAllocs, e.SnapshotIndex
		if e.DeploymentID != "" {
			c.DeploymentID = e.DeploymentID
		}
		answered = append(answered, &c)
	}
	t.putEvals(answered)
}

// Answerable says whether the plan of another evaluation of the job can answer this
// one too. Each plan reconciles the job as a whole; only an evaluation that waits for a
// time, or for room, is about what the others do not look at. Allocations name only
// such ones as their follow-up.
func (e *Evaluation) Answerable() bool {
	return e.Status == EvalStatusPending && e.Wait == 0 && e.WaitUntil == 0
}
