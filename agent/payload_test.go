package agent

import (
	"testing"

	"github.com/rxvision/rxvision/cluster"
)

// TestPayloadOfADispatchedJob: the task finds the payload in its own directory, and what the dispatch said of meta.
func TestPayloadOfADispatchedJob(t *testing.T) {
	s := newFleetServer(t)
	halting(t, s, startAgent(t, testConfig(t, s)))
	task := shell("t", `cat "$NOMAD_TASK_DIR/in/data"; echo " for $NOMAD_META_who of $NOMAD_JOB_PARENT_ID"; stat -c %a "$NOMAD_TASK_DIR/in/data"`)
	task.DispatchPayload = &cluster.DispatchPayloadConfig{File: "in/data"}
	j, alloc := service(t, task)
	j.Type, j.ParentID, j.Dispatched = cluster.JobTypeBatch, "par", true
	j.ParameterizedJob = &cluster.ParameterizedJobConfig{Payload: cluster.PayloadOptional, MetaRequired: []string{"who"}}
	j.Payload, j.Meta = []byte("some input"), map[string]string{"who": "me"}
	s.run(j, alloc)
	s.waitStatus(t, allocID, cluster.AllocClientComplete)
	waitLog(t, s, "t", "some input for me of par\n600\n")
}

// TestPayloadThatCannotBeWritten fails the task with the reason.
func TestPayloadThatCannotBeWritten(t *testing.T) {
	s := newFleetServer(t)
	halting(t, s, startAgent(t, testConfig(t, s)))
	task := shell("t", "true")
	task.DispatchPayload = &cluster.DispatchPayloadConfig{File: "../out"}
	j, alloc := service(t, task)
	j.Payload = []byte("x")
	s.run(j, alloc)
	if got := s.waitStatus(t, allocID, cluster.AllocClientFailed); !hasEvent(got, "t", "Setup Failure", "leads out of the task's local directory") {
		t.Errorf("events %s", kinds(got, "t"))
	}
}
