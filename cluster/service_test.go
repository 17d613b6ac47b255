package cluster

import (
	"fmt"
	"slices"
	"testing"
)

// TestServicesFollowAllocations looks at what is registered while an allocation begins, runs, is moved and ends.
func TestServicesFollowAllocations(t *testing.T) {
	c := newTrial(t, 1, 1, func(u *UpdateStrategy) { u.AutoPromote = false })
	if all := c.Snapshot().Services(nil, "*"); len(all) != 0 {
		t.Fatalf("services of a job without any: %+v", all)
	}
	next := c.version("v3", 1, 1)
	next.TaskGroups[0].Services = []*Service{{Name: "${JOB}-api", PortLabel: "http", Tags: []string{"stable"}, CanaryTags: []string{"n${NOMAD_ALLOC_INDEX}"}}}
	next.TaskGroups[0].Tasks[0].Services = []*Service{{Name: "metrics", TaskName: next.TaskGroups[0].Tasks[0].Name, PortLabel: "9100", Address: "10.1.1.1"}}
	if next.NeedsRules() != rulesScaling {
		t.Errorf("needs rules %d", next.NeedsRules())
	}
	c.must(&RegisterJob{Job: next, EvalID: c.id()})
	c.deploy(1, 1)
	c.place("newest", 0, 2, true)
	names := func(namespace string) (out []string) {
		for _, r := range c.Snapshot().Services(nil, namespace) {
			out = append(out, fmt.Sprint(r.ServiceName, r.Tags, r.AllocID, r.NodeID, r.Address, ":", r.Port))
		}
		return out
	}
	expect := func(what string, want ...string) {
		t.Helper()
		if got := names(c.key.Namespace); !slices.Equal(got, want) {
			t.Errorf("%s: %q, want %q", what, got, want)
		}
	}
	task := next.TaskGroups[0].Tasks[0].Name
	say := func(status, state string) {
		a := c.Snapshot().Alloc(nil, "newest")
		c.must(&UpdateAllocs{Allocs: []*Allocation{{
			ID: a.ID, NodeID: a.NodeID, Epoch: a.Epoch, ClientStatus: status, TaskStates: map[string]*TaskState{task: {State: state}},
		}}})
	}
	expect("before it runs")
	say(AllocClientRunning, TaskStatePending)
	expect("before its task runs", "web-api[n0]newest"+trialNode+":0")
	say(AllocClientRunning, TaskStateRunning)
	expect("running", "metrics[]newest"+trialNode+"10.1.1.1:9100", "web-api[n0]newest"+trialNode+":0")
	if got := names("other"); len(got) != 0 {
		t.Errorf("another namespace has %q", got)
	}
	ws := WatchSet{}
	snap := c.Snapshot()
	snap.Services(ws, "*")
	say(AllocClientFailed, TaskStateDead)
	if !hasFired(ws) {
		t.Error("the end of the allocation wakes nobody who watches services")
	}
	expect("ended")
}

func TestExpand(t *testing.T) {
	j := &Job{ID: "web", Name: "Web", Region: "global", ParentID: "p"}
	a := &Allocation{ID: "0123456789", Namespace: "team", TaskGroup: "g", Name: "web.g[7]"}
	s := &Service{TaskName: "t"}
	for text, want := range map[string]string{
		"plain": "plain", "${JOB}-${GROUP}-${TASK}": "Web-g-t", "${BASE}": "Web-g-t", "${NOMAD_ALLOC_INDEX}${NOMAD_ALLOC_NAME}": "7web.g[7]",
		"${NOMAD_SHORT_ALLOC_ID}.${NOMAD_ALLOC_ID}": "01234567.0123456789", "${NOMAD_JOB_ID}/${NOMAD_JOB_PARENT_ID}": "web/p", "${NOMAD_NAMESPACE}.${NOMAD_REGION}": "team.global",
		"${node.class}": "${node.class}",
	} {
		if got := s.Expand(text, j, a); got != want {
			t.Errorf("%s means %q, want %q", text, got, want)
		}
	}
	if got := ForeignReference("a ${JOB} ${attr.x}"); got != "${attr.x}" {
		t.Errorf("foreign is %q", got)
	}
	for _, ref := range ServiceReferences {
		if got := s.Expand("${"+ref+"}", j, a); got == "${"+ref+"}" {
			t.Errorf("%s means nothing", ref)
		}
	}
	if got := (&Service{}).Expand("${BASE}", j, a); got != "Web-g" {
		t.Errorf("the base of a group is %q", got)
	}
}
