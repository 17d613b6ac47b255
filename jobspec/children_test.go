package jobspec

import (
	"encoding/json"
	"fmt"
	"reflect"
	"strings"
	"testing"
	_ "time/tzdata" // the machine may lack it

	"github.com/hashicorp/nomad/api"

	"github.com/rxvision/rxvision/cluster"
)

// spawning is a batch job with more lines in the job's block, and a task that takes a payload.
func spawning(more string) string {
	src := small("type = \"batch\"\n" + more)
	return strings.Replace(src, "config {", "dispatch_payload {\n file = \"in/data\"\n }\n config {", 1)
}

func TestChildrenDefaults(t *testing.T) {
	for _, c := range []struct {
		hcl           string
		periodic      *cluster.PeriodicConfig
		parameterized *cluster.ParameterizedJobConfig
		warn          string
	}{
		{hcl: "", warn: "without a parameterized block"},
		{hcl: `parameterized {}`, parameterized: &cluster.ParameterizedJobConfig{Payload: "optional"}},
		{hcl: "parameterized {\n payload = \"forbidden\"\n }", parameterized: &cluster.ParameterizedJobConfig{Payload: "forbidden"}, warn: "is forbidden"},
		{
			hcl:           "parameterized {\n payload = \"required\"\n meta_required = [\"b\", \"a\"]\n meta_optional = [\"c\"]\n }",
			parameterized: &cluster.ParameterizedJobConfig{Payload: "required", MetaRequired: []string{"b", "a"}, MetaOptional: []string{"c"}},
		},
		{
			hcl:      "periodic {\n cron = \"@daily\"\n }",
			periodic: &cluster.PeriodicConfig{Enabled: true, SpecType: "cron", Spec: "@daily", TimeZone: "UTC"}, warn: "without a parameterized block",
		},
		{
			hcl:      "parameterized {}\n periodic {\n crons = [\"@daily\", \"*/15 * * * * * *\"]\n prohibit_overlap = true\n enabled = false\n time_zone = \"Europe/Berlin\"\n }",
			periodic: &cluster.PeriodicConfig{SpecType: "cron", Specs: []string{"@daily", "*/15 * * * * * *"}, ProhibitOverlap: true, TimeZone: "Europe/Berlin"}, parameterized: &cluster.ParameterizedJobConfig{Payload: "optional"},
		},
	} {
		in := overTheWire(t, mustParse(t, spawning(c.hcl)))
		job, warnings, err := FromAPI(in, options)
		if err != nil {
			t.Errorf("%s: %v", c.hcl, err)
			continue
		}
		if !reflect.DeepEqual(job.Periodic, c.periodic) || !reflect.DeepEqual(job.ParameterizedJob, c.parameterized) {
			t.Errorf("%s: %s %s", c.hcl, text(job.Periodic), text(job.ParameterizedJob))
		}
		if p := job.TaskGroups[0].Tasks[0].DispatchPayload; p == nil || p.File != "in/data" {
			t.Errorf("%s: payload goes to %+v", c.hcl, p)
		}
		if said := strings.Join(warnings, "\n"); (c.warn == "") != (said == "") || !strings.Contains(said, c.warn) {
			t.Errorf("%s: warnings %q, want %q", c.hcl, said, c.warn)
		}
		answer, err := json.Marshal(job)
		if err != nil {
			t.Fatal(err)
		}
		if unknown := jsonPositions(answer, Positions{}); len(unknown) > 0 {
			t.Errorf("%s: the api package does not know: %v", c.hcl, unknown)
		}
		back := &api.Job{}
		if err := json.Unmarshal(answer, back); err != nil {
			t.Fatal(err)
		}
		if again, _, err := FromAPI(back, options); err != nil || !reflect.DeepEqual(again, job) || !reflect.DeepEqual(cluster.Clone(job), job) {
			t.Errorf("%s: submitted again:\n%s\n%v\nwant:\n%s", c.hcl, text(again), err, text(job))
		}
		in.Canonicalize()
		if filled, _, err := FromAPI(in, options); err != nil || !reflect.DeepEqual(filled, job) {
			t.Errorf("%s: with Nomad's defaults filled in:\n%s\n%v\nwant:\n%s", c.hcl, text(filled), err, text(job))
		}
	}
}

// TestChildrenAreNotSubmitted: an answer about a child, sent back, is refused with one sentence.
func TestChildrenAreNotSubmitted(t *testing.T) {
	child := mustJob(t, spawning("parameterized {}"))
	child.ParentID, child.Dispatched, child.Payload, child.DispatchIdempotencyToken = "small", true, []byte("x"), "t"
	answer, err := json.Marshal(child)
	if err != nil {
		t.Fatal(err)
	}
	back := &api.Job{}
	if err := json.Unmarshal(answer, back); err != nil {
		t.Fatal(err)
	}
	_, _, err = FromAPI(back, options)
	if err == nil || strings.Count(err.Error(), "\t*") != 1 || !strings.Contains(err.Error(), `is a child of job "small"`) {
		t.Errorf("a child sent back: %v", err)
	}
}

func TestChildrenBounds(t *testing.T) {
	list := func(n int) string {
		var b strings.Builder
		for i := range n {
			fmt.Fprintf(&b, "\"%d * * * *\", ", i%60)
		}
		return "[" + b.String() + "]"
	}
	for src, want := range map[string]string{
		"periodic {\n crons = " + list(MaxCrons) + "\n}":   "",
		"periodic {\n crons = " + list(MaxCrons+1) + "\n}": "holds 65 expressions; at most 64",
		"periodic {}": "neither cron nor crons",
		"parameterized {\n meta_optional = " + list(60) + "\n}":                       "",
		"parameterized {\n meta_required = " + list(MaxDispatchMeta+1) + "\n}":        "holds 257 keys; at most 256",
		"periodic {\n cron = \"@daily\"\n time_zone = \"Local\"\n}":                   "may differ between servers",
		"periodic {\n cron = \"@daily\"\n}\nparameterized {\n payload = \"never\"\n}": `unknown value "never"`,
	} {
		_, _, err := FromAPI(mustParse(t, spawning(src)), options)
		if (want == "") != (err == nil) || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%.60s: %v, want %q", src, err, want)
		}
	}
	job := mustParse(t, spawning("periodic {\n cron = \"@daily\"\n}"))
	job.Periodic.SpecType = new(string)
	*job.Periodic.SpecType = "test"
	if _, _, err := FromAPI(job, options); err == nil || !strings.Contains(err.Error(), `periodic.SpecType: unknown value "test"`) {
		t.Errorf("another kind of times: %v", err)
	}
}

func TestDiffOfChildren(t *testing.T) {
	one := mustJob(t, spawning("periodic {\n crons = [\"@daily\"]\n }\n parameterized {\n meta_required = [\"a\"]\n }"))
	two := mustJob(t, strings.Replace(spawning("periodic {\n crons = [\"@daily\", \"@weekly\"]\n enabled = false\n }\n parameterized {\n meta_required = [\"b\"]\n payload = \"required\"\n }"), "in/data", "other", 1))
	none := mustJob(t, small(`type = "batch"`))
	const changed = `~ job small
~ Periodic {
  ~ Enabled: "true" => "false"
  ~ Specs {
    + Specs: "" => "@weekly"
~ ParameterizedJob {
  ~ Payload: "optional" => "required"
  ~ MetaRequired {
    - MetaRequired: "a" => ""
    + MetaRequired: "" => "b"
~ group g
  ~ task t
    ~ DispatchPayload {
      ~ File: "in/data" => "other"
`
	if got := lines(Diff(one, two, false, nil)); got != changed {
		t.Errorf("got:\n%s\nwant:\n%s", got, changed)
	}
	const added = `~ job small
+ Periodic {
  + Enabled: "" => "true"
  + ProhibitOverlap: "" => "false"
  + SpecType: "" => "cron"
  + TimeZone: "" => "UTC"
  + Specs {
    + Specs: "" => "@daily"
+ ParameterizedJob {
  + Payload: "" => "optional"
  + MetaRequired {
    + MetaRequired: "" => "a"
~ group g
  ~ task t
    + DispatchPayload {
      + File: "" => "in/data"
`
	if got := lines(Diff(none, one, false, nil)); got != added {
		t.Errorf("got:\n%s\nwant:\n%s", got, added)
	}
	if d := Diff(two, two, true, nil); d.Type != diffNone || len(d.Objects) > 0 {
		t.Errorf("diff of a job with itself: %s", text(d))
	}
}
