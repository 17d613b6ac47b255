package agent

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/fleet/pb"
)

// checked is a service that is asked at the path, often.
func checked(path string) *cluster.Service {
	return &cluster.Service{Name: "${JOB}-web", Provider: cluster.ServiceProviderNomad, PortLabel: "serve", Checks: []*cluster.ServiceCheck{{
		Name: "alive", Type: cluster.CheckHTTP, Protocol: "http", Method: "GET", Path: path,
		Interval: 20 * time.Millisecond, Timeout: time.Minute, OnUpdate: cluster.OnUpdateRequireHealthy,
	}}}
}

// checks gives what the agent answers of an allocation's checks.
func (s *fleetServer) checks(t *testing.T, id string) map[string]checkResult {
	t.Helper()
	b, _, err := s.ask(t, &pb.Call{Request: &pb.Call_Checks{Checks: &pb.ChecksRequest{AllocId: id}}})
	if err != nil {
		t.Fatal(err)
	}
	var out map[string]checkResult
	if err := json.Unmarshal(b, &out); err != nil {
		t.Fatal(err)
	}
	return out
}

func (s *fleetServer) waitCheck(t *testing.T, id, name, status, output string) checkResult {
	t.Helper()
	var got checkResult
	waitFor(t, "check "+name+" "+status, func() bool {
		for _, c := range s.checks(t, id) {
			if c.Check == name {
				got = c
			}
		}
		return got.Status == status && strings.Contains(got.Output, output)
	})
	return got
}

func TestChecksOfServices(t *testing.T) {
	s := newFleetServer(t)
	halting(t, s, startAgent(t, testConfig(t, s)))
	j, alloc := service(t, onnxTask("m", s.model("a model")))
	g := j.TaskGroups[0]
	port := alloc.AllocatedResources.Shared.Ports[0]
	svc := checked(probePath)
	svc.PortLabel = port.Label
	g.Services = []*cluster.Service{svc}
	svc.Checks = append(svc.Checks,
		&cluster.ServiceCheck{Name: "port", Type: cluster.CheckTCP, Interval: 20 * time.Millisecond, Timeout: time.Minute, OnUpdate: cluster.OnUpdateRequireHealthy},
		&cluster.ServiceCheck{Name: "closed", Type: cluster.CheckTCP, PortLabel: "1", Interval: 20 * time.Millisecond, Timeout: time.Minute, OnUpdate: cluster.OnUpdateIgnore},
		&cluster.ServiceCheck{Name: "nowhere", Type: cluster.CheckTCP, PortLabel: "nope", Interval: 20 * time.Millisecond, Timeout: time.Minute, OnUpdate: cluster.OnUpdateIgnore})
	s.run(j, alloc)
	got := s.waitCheck(t, alloc.ID, "alive", checkSuccess, "http ok")
	if got.StatusCode != 200 || got.Service != j.Name+"-web" || got.Mode != modeHealthiness || got.Timestamp == 0 {
		t.Errorf("got %+v", got)
	}
	s.waitCheck(t, alloc.ID, "port", checkSuccess, "tcp ok")
	if got := s.waitCheck(t, alloc.ID, "closed", checkFailure, "refused"); got.Mode != modeReadiness {
		t.Errorf("got %+v", got)
	}
	s.waitCheck(t, alloc.ID, "nowhere", checkFailure, `no port "nope"`)
	post(t, alloc, "/unready")
	if got := s.waitCheck(t, alloc.ID, "alive", checkFailure, ""); got.StatusCode/100 == 2 {
		t.Errorf("got %+v", got)
	}

	// The job's next version has other checks: they change while the task runs on.
	next := *j
	group, changed := *g, *svc
	changed.Checks = []*cluster.ServiceCheck{svc.Checks[0], {Name: "later", Type: cluster.CheckTCP, Interval: 20 * time.Millisecond, Timeout: time.Minute}}
	group.Services = []*cluster.Service{&changed}
	next.Version, next.TaskGroups = j.Version+1, []*cluster.TaskGroup{&group}
	s.want(func() { s.jobs[j.ID] = &next })
	s.edit(alloc.ID, func(a *cluster.Allocation) { a.JobVersion = next.Version })
	s.waitCheck(t, alloc.ID, "later", checkSuccess, "tcp ok")
	if got := s.checks(t, alloc.ID); len(got) != 2 {
		t.Errorf("checks after the update: %+v", got)
	}
	post(t, alloc, "/ready")
	s.waitCheck(t, alloc.ID, "alive", checkSuccess, "http ok")
}

func TestHealthByChecks(t *testing.T) {
	s := newFleetServer(t)
	halting(t, s, startAgent(t, testConfig(t, s)))
	deploy := func(id, path string, deadline time.Duration, change func(*cluster.Service)) *cluster.Allocation {
		j, alloc := service(t, onnxTask("t", s.model("fine")))
		j.ID, alloc.JobID, alloc.ID, alloc.DeploymentID = id, id, id, "d-"+id
		svc := checked(path)
		svc.PortLabel = alloc.AllocatedResources.Shared.Ports[0].Label
		if change != nil {
			change(svc)
		}
		j.TaskGroups[0].Services = []*cluster.Service{svc}
		j.TaskGroups[0].Update = &cluster.UpdateStrategy{HealthCheck: healthChecks, MinHealthyTime: 50 * time.Millisecond, HealthyDeadline: deadline}
		s.run(j, alloc)
		return alloc
	}
	deploy("good", probePath, time.Hour, nil)
	s.waitHealth(t, "good", true)
	deploy("bad", "/nothing", 300*time.Millisecond, nil)
	s.waitHealth(t, "bad", false)
	s.waitEvent(t, "bad", "t", "Alloc Unhealthy", unhealthyChecks)
	deploy("ignored", "/nothing", time.Hour, func(svc *cluster.Service) { svc.Checks[0].OnUpdate = cluster.OnUpdateIgnore })
	s.waitHealth(t, "ignored", true)
}

func TestCheckRestarts(t *testing.T) {
	s := newFleetServer(t)
	halting(t, s, startAgent(t, testConfig(t, s)))
	j, alloc := service(t, onnxTask("m", s.model("a model")))
	g := j.TaskGroups[0]
	g.RestartPolicy = &cluster.RestartPolicy{Attempts: 1, Interval: time.Hour, Delay: time.Millisecond, Mode: modeFail}
	svc := checked(probePath)
	svc.PortLabel = alloc.AllocatedResources.Shared.Ports[0].Label
	svc.Checks[0].TaskName, svc.Checks[0].CheckRestart = "m", &cluster.CheckRestart{Limit: 3}
	g.Services = []*cluster.Service{svc}
	s.run(j, alloc)
	s.waitCheck(t, alloc.ID, "alive", checkSuccess, "")
	post(t, alloc, "/unready")
	s.waitEvent(t, alloc.ID, "m", eventRestartSignal, `healthcheck: check "alive" unhealthy`)
	s.waitEvent(t, alloc.ID, "m", "Restarting", "")
	s.waitCheck(t, alloc.ID, "alive", checkSuccess, "") // the new process knows nothing of it
	post(t, alloc, "/unready")
	s.wait(t, "the policy to allow no more", func() bool { return s.reported[alloc.ID].ClientStatus == cluster.AllocClientFailed })
}
