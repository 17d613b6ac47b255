package api_test

import (
	"net/http"
	"regexp"
	"strings"
	"testing"
	"time"
	_ "time/tzdata" // the machine may lack it

	nomad "github.com/hashicorp/nomad/api"

	"github.com/rxvision/rxvision/cluster"
)

// batcher is a batch job that a dispatch or a time may start.
func batcher(id string, p *nomad.ParameterizedJobConfig, times *nomad.PeriodicConfig) *nomad.Job {
	j := sleeper(id)
	j.Type, j.ParameterizedJob, j.Periodic = ptr("batch"), p, times
	return j
}

// TestDispatchAndForce asks for children as the nomad client does.
func TestDispatchAndForce(t *testing.T) {
	w := newWire(t)
	w.knows("new", cluster.CurrentRules)
	jobs := w.client().Jobs()
	for _, j := range []*nomad.Job{
		batcher("par", &nomad.ParameterizedJobConfig{MetaRequired: []string{"who"}}, nil),
		batcher("per", nil, &nomad.PeriodicConfig{Specs: []string{"0 0 1 1 *"}, SpecType: ptr("cron"), TimeZone: ptr("Europe/Berlin")}),
		batcher("off", nil, &nomad.PeriodicConfig{Spec: ptr("@daily"), Enabled: ptr(false)}),
	} {
		if r, _, err := jobs.Register(j, nil); err != nil || r.EvalID != "" || r.EvalCreateIndex != 0 {
			t.Fatalf("register %s: %+v, %v", *j.ID, r, err)
		}
	}
	one, _, err := jobs.DispatchOpts(&nomad.DispatchOptions{JobID: "par", Meta: map[string]string{"who": "me"}, Payload: []byte("in"), IdPrefixTemplate: "night", Priority: 60}, nil)
	if err != nil || !regexp.MustCompile(`^par/dispatch-night-\d+-[0-9a-f]{8}$`).MatchString(one.DispatchedJobID) || one.EvalID == "" || one.EvalCreateIndex != one.JobCreateIndex || one.JobCreateIndex == 0 {
		t.Fatalf("dispatched %+v, %v", one, err)
	}
	child, _, err := jobs.Info(one.DispatchedJobID, nil)
	if err != nil || *child.ParentID != "par" || !child.Dispatched || string(child.Payload) != "in" || child.Meta["who"] != "me" || *child.Priority != 60 || *child.Status != "pending" {
		t.Errorf("child %s, %v", pretty(t, child), err)
	}
	evals, _, err := jobs.Evaluations(one.DispatchedJobID, nil)
	if err != nil || len(evals) != 1 || evals[0].ID != one.EvalID {
		t.Errorf("evaluations %s, %v", pretty(t, evals), err)
	}

	token := &nomad.WriteOptions{IdempotencyToken: "once"}
	first, _, err1 := jobs.Dispatch("par", map[string]string{"who": "me"}, nil, "", token)
	again, _, err2 := jobs.Dispatch("par", map[string]string{"who": "me"}, nil, "", token)
	if err1 != nil || err2 != nil || again.DispatchedJobID != first.DispatchedJobID || again.EvalID != "" || again.EvalCreateIndex != 0 || again.JobCreateIndex != first.JobCreateIndex {
		t.Errorf("with a token: %+v, then %+v (%v, %v)", first, again, err1, err2)
	}
	sum, _, err := jobs.Summary("par", nil)
	if err != nil || *sum.Children != (nomad.JobChildrenSummary{Pending: 2}) {
		t.Errorf("summary %s, %v", pretty(t, sum), err)
	}

	forced, _, err := jobs.PeriodicForce("per", nil)
	if err != nil {
		t.Fatal(err)
	}
	if e := w.store.State().Snapshot().Eval(nil, forced); e == nil || e.TriggeredBy != "periodic-job" || !strings.HasPrefix(e.JobID, "per/periodic-") {
		t.Errorf("forced %+v", e)
	}
	for query, want := range map[string]string{
		"":                                 "off par " + one.DispatchedJobID + " " + first.DispatchedJobID + " per " + w.store.State().Snapshot().Eval(nil, forced).JobID,
		"?prefix=par/dispatch-night":       one.DispatchedJobID,
		"?prefix=per/periodic-":            w.store.State().Snapshot().Eval(nil, forced).JobID,
		"?filter=ParameterizedJob+==+true": "par",
		"?filter=Periodic+==+true":         "off per",
		"?filter=ParentID+==+%22par%22":    one.DispatchedJobID + " " + first.DispatchedJobID,
	} {
		r := w.get("/v1/jobs" + query)
		got, wanted := strings.Fields(w.ids(r, "ID")), strings.Fields(want)
		if !sameSet(got, wanted) {
			t.Errorf("jobs%s: %v, want %v", query, got, wanted)
		}
	}

	for _, c := range []struct {
		path, body string
		status     int
		text       string
	}{
		{"/v1/job/par/dispatch", `{"JobID":"par"}`, 500, "Dispatch did not provide required meta keys: [who]"},
		{"/v1/job/par/dispatch", `{"JobID":"other"}`, 400, "JobID not same as job name"},
		{"/v1/job/par/dispatch", ``, 400, "Request body is empty"},
		{"/v1/job/par/dispatch", `{"Payload":"!"}`, 400, ""},
		{"/v1/job/per/dispatch", `{}`, 500, `job "per" is not a parameterized job`},
		{"/v1/job/nobody/dispatch", `{}`, 500, `parameterized job "nobody" not found`},
		{"/v1/job/par/periodic/force", ``, 500, `job "par" is not a periodic job`},
		{"/v1/job/off/periodic/force", ``, 500, `periodic job "off" is not enabled`},
		{"/v1/job/nobody/periodic/force", ``, 500, `periodic job "nobody" not found`},
		{"/v1/job/par/evaluate", `{"JobID":"par"}`, 500, "can't evaluate parameterized job"},
		{"/v1/job/per/evaluate", `{"JobID":"per"}`, 500, "can't evaluate periodic job"},
	} {
		r := w.do(http.MethodPut, c.path, c.body)
		if r.status != c.status || c.text != "" && r.body != c.text {
			t.Errorf("%s %s: %d %q, want %d %q", c.path, c.body, r.status, r.body, c.status, c.text)
		}
	}
	w.apply(&cluster.SetSchedulerConfig{Config: &cluster.SchedulerConfiguration{RejectJobRegistration: true}})
	if r := w.do(http.MethodPut, "/v1/job/par/dispatch", `{"Meta":{"who":"me"}}`); r.status != 403 {
		t.Errorf("while registrations are refused: %d %s", r.status, r.body)
	}
}

func sameSet(a, b []string) bool {
	count := map[string]int{}
	for _, s := range a {
		count[s]++
	}
	for _, s := range b {
		count[s]--
	}
	for _, n := range count {
		if n != 0 {
			return false
		}
	}
	return true
}

// TestPlanOfChildren: a plan says when a periodic job is launched next, in its own time zone.
func TestPlanOfChildren(t *testing.T) {
	w := newWire(t)
	w.knows("new", cluster.CurrentRules)
	berlin, err := time.LoadLocation("Europe/Berlin")
	if err != nil {
		t.Fatal(err)
	}
	plan := func(j *nomad.Job) time.Time {
		t.Helper()
		p, _, err := w.client().Jobs().Plan(j, true, nil)
		if err != nil {
			t.Fatal(err)
		}
		return p.NextPeriodicLaunch
	}
	times := &nomad.PeriodicConfig{Specs: []string{"0 0 1 1 *"}, SpecType: ptr("cron"), TimeZone: ptr("Europe/Berlin")}
	before := time.Now().In(berlin)
	at := plan(batcher("per", nil, times))
	if want := time.Date(before.Year()+1, 1, 1, 0, 0, 0, 0, berlin); !at.Equal(want) && before.Year() == time.Now().In(berlin).Year() {
		t.Errorf("next launch %v, want %v", at, want)
	}
	if at := plan(batcher("both", &nomad.ParameterizedJobConfig{}, times)); !at.IsZero() {
		t.Errorf("a job that is to be dispatched first is launched at %v", at)
	}
	if at := plan(sleeper("web")); !at.IsZero() {
		t.Errorf("a service is launched at %v", at)
	}
}

const childrenJob = `job "par" {
  type = "batch"
  parameterized {
    payload       = "optional"
    meta_required = ["who"]
  }
  group "g" {
    task "t" {
      driver = "raw_exec"
      config {
        command = "/bin/sleep"
        args    = ["1000"]
      }
      dispatch_payload {
        file = "in"
      }
    }
  }
}
`

// TestCommandLineChildren drives the unmodified nomad through jobs with children.
func TestCommandLineChildren(t *testing.T) {
	c := newCLI(t)
	c.file("par.hcl", childrenJob)
	c.file("in.txt", "hello")
	c.file("per.hcl", strings.NewReplacer(`"par"`, `"per"`, `parameterized {
    payload       = "optional"
    meta_required = ["who"]
  }`, `periodic {
    crons            = ["0 0 1 1 *"]
    prohibit_overlap = true
    time_zone        = "Europe/Berlin"
  }`).Replace(childrenJob))
	c.fails(1, "job plan -verbose par.hcl", `+ Job: "par"`, "+ ParameterizedJob {", `+ Payload: "optional"`, `+ MetaRequired: "who"`, "+ DispatchPayload {", `+ File: "in"`)
	c.run("job run par.hcl", "Job registration successful")
	c.run("job status", "par batch/parameterized 50 running")
	c.run("job status par", "Status = running", "Parameterized = true", "Payload = optional", "Required Metadata = who", "No dispatched instances")
	c.fails(1, "job dispatch par", "Dispatch did not provide required meta keys: [who]")
	out := c.run("job dispatch -meta who=me -id-prefix-template night par in.txt", "Dispatched Job ID = par/dispatch-night-", `finished with status "complete"`)
	child := regexp.MustCompile(`par/dispatch-night-\d+-[0-9a-f]{8}`).FindString(out)
	c.settled(child, 1)
	c.run("job status par", "Pending Running Dead", "0 1 0", "Dispatched Jobs", child+" running")
	c.run("job status "+child, "ID = "+child, "Status = running", "g 0 0 1 0 0 0 0")
	c.run("job inspect "+child, `"ParentID": "par"`, `"Payload": "aGVsbG8="`, `"who": "me"`, `"Dispatched": true`)
	first := c.run("job dispatch -detach -meta who=you -idempotency-token=abc par", "Dispatched Job ID")
	if again := c.run("job dispatch -detach -meta who=you -idempotency-token=abc par"); !strings.Contains(again, regexp.MustCompile(`par/dispatch-\d+-[0-9a-f]{8}`).FindString(first)) {
		t.Errorf("the same token gave\n%s\nafter\n%s", again, first)
	}
	c.fails(1, "job eval par", "can't evaluate parameterized job")
	c.run("job stop -detach " + child)
	c.settled(child, 0)
	c.run("job status par", "0 1 1")

	c.fails(1, "job plan -verbose per.hcl", "+ Periodic {", `+ ProhibitOverlap: "true"`, `+ Specs: "0 0 1 1 *"`, "next periodic launch would be at", "T00:00:00+01:00")
	c.run("job run per.hcl", "Job registration successful", "Approximate next launch time:")
	c.run("job status per", "Status = running", "Periodic = true", "Next Periodic Launch =", "No instances of periodic job found")
	out = c.run("job periodic force per", `Evaluation triggered by job "per/periodic-`, `finished with status "complete"`)
	launched := regexp.MustCompile(`per/periodic-\d+`).FindString(out)
	c.settled(launched, 1)
	c.run("job status per", "0 1 0", "Previously Launched Jobs", launched+" running")
	c.fails(1, "job periodic force par", "No periodic job(s) with prefix or ID")
	c.run("job stop per")
	c.run("job status per", "Status = dead (stopped)")
	c.run("job status "+launched, "Status = running")
	c.run("job stop -purge -detach per")
	c.run("status "+launched, "Status = running")
}
