package cluster

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
)

func TestScaleJob(t *testing.T) {
	c := newTrial(t, 2, 0)
	count := func(n int64) *int64 { return &n }
	scale := func(n *int64, message string) *ScaleJob {
		return &ScaleJob{Namespace: DefaultNamespace, JobID: "web", Group: "web", Count: n, Message: message, EvalID: c.id()}
	}
	c.refuses(scale(count(3), ""), "job scaling blocked due to active deployment")
	j := c.version("v3", 2, 0)
	j.TaskGroups[0].Scaling = &ScalingPolicy{Type: ScalingHorizontal, Min: 1, Max: 5, Enabled: true, Policy: json.RawMessage(`{"a":1.50}`)}
	if j.NeedsRules() != rulesEngine {
		t.Errorf("a job with a scaling block needs rules %d", j.NeedsRules())
	}
	c.must(&UpdateDeployment{Update: &DeploymentStatusUpdate{c.d, DeploymentFailed, "x"}})
	c.must(&RegisterJob{Job: j})
	c.refuses(scale(count(6), ""), "group count was greater than scaling policy maximum: 6 > 5")
	c.refuses(scale(count(0), ""), "group count was less than scaling policy minimum: 0 < 1")
	c.refuses(scale(nil, strings.Repeat("x", MaxScalingMessage+1)), "the message of a scaling event may have")
	wrong := scale(count(3), "")
	wrong.Group = "nope"
	c.refuses(wrong, `task group "nope" specified for scaling does not exist in job`)
	stale := scale(count(3), "")
	stale.JobModifyIndex = 1
	c.refuses(stale, "conflicting job modify index")

	res := c.must(scale(count(4), "more"))
	now := c.Snapshot().Job(nil, c.key)
	if now.TaskGroups[0].Count != 4 || res.EvalID == "" || res.Version != now.Version || string(now.TaskGroups[0].Scaling.Policy) != `{"a":1.50}` {
		t.Errorf("scaled: %+v, count %d", res, now.TaskGroups[0].Count)
	}
	if e := c.Snapshot().Eval(nil, res.EvalID); e == nil || e.TriggeredBy != TriggerScaling {
		t.Errorf("evaluation %+v", e)
	}
	if res := c.must(scale(nil, "why not")); res.EvalID != "" || res.JobModifyIndex != now.JobModifyIndex {
		t.Errorf("an event alone gave %+v", res)
	}
	events := c.Snapshot().Scaling(nil, c.key).Groups["web"].Events
	if len(events) != 2 || events[0].Message != "why not" || events[1].PreviousCount != 2 || *events[1].Count != 4 || events[1].EvalID != res.EvalID {
		t.Errorf("events %+v", events)
	}
	for i := range 2 * MaxScalingEvents {
		c.must(scale(nil, fmt.Sprint(i)))
	}
	if events := c.Snapshot().Scaling(nil, c.key).Groups["web"].Events; len(events) != MaxScalingEvents || events[0].Message != fmt.Sprint(2*MaxScalingEvents-1) {
		t.Errorf("%d events are kept", len(events))
	}
	c.must(&DeregisterJob{Namespace: DefaultNamespace, JobID: "web", Purge: true})
	if c.Snapshot().Scaling(nil, c.key) != nil {
		t.Error("what is remembered of a purged job is kept")
	}
}
