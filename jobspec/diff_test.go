package jobspec

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/hashicorp/nomad/api"

	"github.com/rxvision/rxvision/cluster"
)

// lines renders a difference one change a line, as `nomad job plan` does with
// signs: + added, - deleted, ~ edited, = the same.
func lines(d *api.JobDiff) string {
	var b strings.Builder
	sign := map[string]string{diffAdded: "+", diffDeleted: "-", diffEdited: "~", diffNone: "="}
	var objects func(indent string, list []*api.ObjectDiff)
	fields := func(indent string, list []*api.FieldDiff) {
		for _, f := range list {
			fmt.Fprintf(&b, "%s%s %s: %q => %q", indent, sign[f.Type], f.Name, f.Old, f.New)
			if f.Annotations != nil {
				fmt.Fprintf(&b, " %q", f.Annotations)
			}
			b.WriteByte('\n')
		}
	}
	objects = func(indent string, list []*api.ObjectDiff) {
		for _, o := range list {
			fmt.Fprintf(&b, "%s%s %s {\n", indent, sign[o.Type], o.Name)
			fields(indent+"  ", o.Fields)
			objects(indent+"  ", o.Objects)
		}
	}
	fmt.Fprintf(&b, "%s job %s\n", sign[d.Type], d.ID)
	fields("", d.Fields)
	objects("", d.Objects)
	for _, g := range d.TaskGroups {
		fmt.Fprintf(&b, "%s group %s", sign[g.Type], g.Name)
		if g.Updates != nil {
			fmt.Fprintf(&b, " %v", g.Updates)
		}
		b.WriteByte('\n')
		fields("  ", g.Fields)
		objects("  ", g.Objects)
		for _, t := range g.Tasks {
			fmt.Fprintf(&b, "  %s task %s", sign[t.Type], t.Name)
			if t.Annotations != nil {
				fmt.Fprintf(&b, " %q", t.Annotations)
			}
			b.WriteByte('\n')
			fields("    ", t.Fields)
			objects("    ", t.Objects)
		}
	}
	return b.String()
}

func annotations(u cluster.DesiredUpdates) *cluster.PlanAnnotations {
	return &cluster.PlanAnnotations{DesiredTGUpdates: map[string]*cluster.DesiredUpdates{"g": &u}}
}

// TestDiffOfNewJob has the fields that a server of Nomad 1.11.1 lists for such a
// job, less those of blocks that are not honoured.
func TestDiffOfNewJob(t *testing.T) {
	got := lines(Diff(nil, mustJob(t, small("")), true, annotations(cluster.DesiredUpdates{Place: 1})))
	const want = `+ job small
+ AllAtOnce: "" => "false"
+ Dispatched: "" => "false"
+ Name: "" => "small"
+ Namespace: "" => "default"
+ NodePool: "" => "default"
+ Priority: "" => "50"
+ Region: "" => "global"
+ Stop: "" => "false"
+ Type: "" => "service"
+ Datacenters {
  + Datacenters: "" => "*"
+ group g map[create:1]
  + Count: "" => "1" ["forces create"]
  + RestartPolicy {
    + Attempts: "" => "2"
    + Delay: "" => "15000000000"
    + Interval: "" => "1800000000000"
    + Mode: "" => "fail"
    + RenderTemplates: "" => "false"
  + Migrate {
    + HealthCheck: "" => "checks"
    + HealthyDeadline: "" => "300000000000"
    + MaxParallel: "" => "1"
    + MinHealthyTime: "" => "10000000000"
  + ReschedulePolicy {
    + Attempts: "" => "0"
    + Delay: "" => "30000000000"
    + DelayFunction: "" => "exponential"
    + Interval: "" => "0"
    + MaxDelay: "" => "3600000000000"
    + Unlimited: "" => "true"
  + EphemeralDisk {
    + Migrate: "" => "false"
    + SizeMB: "" => "300"
    + Sticky: "" => "false"
  + Update {
    + AutoPromote: "" => "false"
    + AutoRevert: "" => "false"
    + Canary: "" => "0"
    + HealthCheck: "" => "checks"
    + HealthyDeadline: "" => "300000000000"
    + MaxParallel: "" => "1"
    + MinHealthyTime: "" => "10000000000"
    + ProgressDeadline: "" => "600000000000"
  + task t ["forces create"]
    + Driver: "" => "raw_exec"
    + KillTimeout: "" => "5000000000"
    + Leader: "" => "false"
    + ShutdownDelay: "" => "0"
    + Config {
      + command: "" => "/bin/true"
    + Resources {
      + CPU: "" => "100"
      + Cores: "" => "0"
      + DiskMB: "" => "0"
      + MemoryMB: "" => "300"
      + MemoryMaxMB: "" => "0"
    + LogConfig {
      + Disabled: "" => "false"
      + MaxFileSizeMB: "" => "10"
      + MaxFiles: "" => "10"
`
	if got != want {
		t.Errorf("got:\n%s\nwant:\n%s", got, want)
	}
}

func TestDiffOfChanges(t *testing.T) {
	for name, c := range map[string]struct {
		change     func(j *cluster.Job)
		updates    cluster.DesiredUpdates
		contextual bool
		want       string
	}{
		"nothing": {
			change:  func(*cluster.Job) {},
			updates: cluster.DesiredUpdates{Ignore: 1},
			want: `= job small
= group g map[ignore:1]
  = task t
`,
		},
		"what the state sets": {
			change: func(j *cluster.Job) {
				j.Status, j.Stable, j.Version, j.SubmitTime = "running", true, 4, 5
				j.CreateIndex, j.ModifyIndex, j.JobModifyIndex = 1, 2, 3
			},
			want: `= job small
= group g
  = task t
`,
		},
		"memory": {
			change:     func(j *cluster.Job) { j.TaskGroups[0].Tasks[0].Resources.MemoryMB = 80 },
			updates:    cluster.DesiredUpdates{Ignore: 1, DestructiveUpdate: 1},
			contextual: true,
			want: `~ job small
~ group g map[create/destroy update:1 ignore:1]
  ~ task t ["forces create/destroy update"]
    ~ Resources {
      = CPU: "100" => "100"
      = Cores: "0" => "0"
      = DiskMB: "0" => "0"
      ~ MemoryMB: "300" => "80"
      = MemoryMaxMB: "0" => "0"
`,
		},
		"scaled up": {
			change:  func(j *cluster.Job) { j.TaskGroups[0].Count = 3 },
			updates: cluster.DesiredUpdates{Ignore: 1, Place: 2},
			want: `~ job small
~ group g map[create:2 ignore:1]
  ~ Count: "1" => "3" ["forces create"]
  = task t
`,
		},
		"scaled down": {
			change:  func(j *cluster.Job) { j.TaskGroups[0].Count = 0 },
			updates: cluster.DesiredUpdates{Stop: 1},
			want: `~ job small
~ group g map[destroy:1]
  ~ Count: "1" => "0" ["forces destroy"]
  = task t
`,
		},
		"stopped": {
			change:  func(j *cluster.Job) { j.Stop = true },
			updates: cluster.DesiredUpdates{Stop: 1},
			want: `~ job small
~ Stop: "false" => "true"
= group g map[destroy:1]
  = task t
`,
		},
		"in place": {
			change: func(j *cluster.Job) {
				j.TaskGroups[0].Tasks[0].LogConfig.MaxFiles = 3
				j.Priority = 70
			},
			updates: cluster.DesiredUpdates{InPlaceUpdate: 1},
			want: `~ job small
~ Priority: "50" => "70"
~ group g map[in-place update:1]
  ~ task t ["forces in-place update"]
    ~ LogConfig {
      ~ MaxFiles: "10" => "3"
`,
		},
		"the group's restart shows once": {
			change: func(j *cluster.Job) {
				j.TaskGroups[0].RestartPolicy.Attempts = 7
				j.TaskGroups[0].Tasks[0].RestartPolicy.Attempts = 7
			},
			updates: cluster.DesiredUpdates{InPlaceUpdate: 1},
			want: `~ job small
~ group g map[in-place update:1]
  ~ RestartPolicy {
    ~ Attempts: "2" => "7"
  = task t
`,
		},
		"maps, lists and blocks": {
			change: func(j *cluster.Job) {
				j.Datacenters = []string{"dc1", "dc2"}
				j.Meta = map[string]string{"owner": "me"}
				j.Constraints = []*cluster.Constraint{{LTarget: "${attr.arch}", Operand: "=", RTarget: "arm64"}}
				g := j.TaskGroups[0]
				g.Networks = []*cluster.NetworkResource{{
					Mode:          "host",
					ReservedPorts: []cluster.Port{{Label: "admin", Value: 9100, HostNetwork: "default"}},
					DynamicPorts:  []cluster.Port{{Label: "http", HostNetwork: "default"}},
				}}
				task := g.Tasks[0]
				task.Config = json.RawMessage(`{"args":["-n","5"],"command":"/bin/true"}`)
				task.Env = map[string]string{"A": "1"}
				task.Resources.Devices = []*cluster.RequestedDevice{{
					Name: "nvidia/gpu", Count: 2,
					Constraints: []*cluster.Constraint{{LTarget: "${device.model}", Operand: "is_set"}},
				}}
				task.Templates = []*cluster.Template{{DestPath: "local/x", EmbeddedTmpl: "y"}}
			},
			updates: cluster.DesiredUpdates{DestructiveUpdate: 1},
			want: `~ job small
+ Meta[owner]: "" => "me"
~ Datacenters {
  - Datacenters: "*" => ""
  + Datacenters: "" => "dc1"
  + Datacenters: "" => "dc2"
+ Constraint {
  + LTarget: "" => "${attr.arch}"
  + Operand: "" => "="
  + RTarget: "" => "arm64"
~ group g map[create/destroy update:1]
  + Network {
    + Mode: "" => "host"
    + Static Port {
      + HostNetwork: "" => "default"
      + Label: "" => "admin"
      + To: "" => "0"
      + Value: "" => "9100"
    + Dynamic Port {
      + HostNetwork: "" => "default"
      + Label: "" => "http"
      + To: "" => "0"
  ~ task t ["forces create/destroy update"]
    + Env[A]: "" => "1"
    ~ Config {
      + args[0]: "" => "-n"
      + args[1]: "" => "5"
    ~ Resources {
      + Device {
        + Count: "" => "2"
        + Name: "" => "nvidia/gpu"
        + Constraint {
          + LTarget: "" => "${device.model}"
          + Operand: "" => "is_set"
    + Template {
      + DestPath: "" => "local/x"
      + EmbeddedTmpl: "" => "y"
      + Envvars: "" => "false"
`,
		},
		"affinities and spreads": {
			change: func(j *cluster.Job) {
				j.Affinities = []*cluster.Affinity{{LTarget: "${meta.rack}", Operand: "=", RTarget: "r1", Weight: 50}}
				j.Spreads = []*cluster.Spread{{Attribute: "${meta.rack}", Weight: 50, SpreadTarget: []*cluster.SpreadTarget{{Value: "r1", Percent: 60}}}}
				g := j.TaskGroups[0]
				g.Affinities = []*cluster.Affinity{{LTarget: "${meta.new}", Operand: "is_set", Weight: -50}}
				g.Spreads = []*cluster.Spread{{Attribute: "${node.class}", Weight: 100}}
				g.Tasks[0].Affinities = []*cluster.Affinity{{LTarget: "${attr.x}", Operand: ">", RTarget: "1", Weight: 1}}
				g.Tasks[0].Resources.Devices = []*cluster.RequestedDevice{{
					Name: "gpu", Count: 1, Affinities: []*cluster.Affinity{{LTarget: "${device.model}", Operand: "=", RTarget: "H100", Weight: 7}},
				}}
			},
			updates: cluster.DesiredUpdates{InPlaceUpdate: 1},
			want: `~ job small
+ Affinity {
  + LTarget: "" => "${meta.rack}"
  + Operand: "" => "="
  + RTarget: "" => "r1"
  + Weight: "" => "50"
+ Spread {
  + Attribute: "" => "${meta.rack}"
  + Weight: "" => "50"
  + SpreadTarget {
    + Percent: "" => "60"
    + Value: "" => "r1"
~ group g map[in-place update:1]
  + Affinity {
    + LTarget: "" => "${meta.new}"
    + Operand: "" => "is_set"
    + Weight: "" => "-50"
  + Spread {
    + Attribute: "" => "${node.class}"
    + Weight: "" => "100"
  ~ task t ["forces in-place update"]
    + Affinity {
      + LTarget: "" => "${attr.x}"
      + Operand: "" => ">"
      + RTarget: "" => "1"
      + Weight: "" => "1"
    ~ Resources {
      + Device {
        + Count: "" => "1"
        + Name: "" => "gpu"
        + Affinity {
          + LTarget: "" => "${device.model}"
          + Operand: "" => "="
          + RTarget: "" => "H100"
          + Weight: "" => "7"
`,
		},
		"a task more, a task less": {
			change: func(j *cluster.Job) { j.TaskGroups[0].Tasks[0].Name = "u" },
			want: `~ job small
~ group g
  - task t ["forces destroy"]
    - Driver: "raw_exec" => ""
    - KillTimeout: "5000000000" => ""
    - Leader: "false" => ""
    - ShutdownDelay: "0" => ""
    - Config {
      - command: "/bin/true" => ""
    - Resources {
      - CPU: "100" => ""
      - Cores: "0" => ""
      - DiskMB: "0" => ""
      - MemoryMB: "300" => ""
      - MemoryMaxMB: "0" => ""
    - LogConfig {
      - Disabled: "false" => ""
      - MaxFileSizeMB: "10" => ""
      - MaxFiles: "10" => ""
  + task u ["forces create"]
    + Driver: "" => "raw_exec"
    + KillTimeout: "" => "5000000000"
    + Leader: "" => "false"
    + ShutdownDelay: "" => "0"
    + Config {
      + command: "" => "/bin/true"
    + Resources {
      + CPU: "" => "100"
      + Cores: "" => "0"
      + DiskMB: "" => "0"
      + MemoryMB: "" => "300"
      + MemoryMaxMB: "" => "0"
    + LogConfig {
      + Disabled: "" => "false"
      + MaxFileSizeMB: "" => "10"
      + MaxFiles: "" => "10"
`,
		},
	} {
		t.Run(name, func(t *testing.T) {
			old, new := mustJob(t, small("")), mustJob(t, small(""))
			c.change(new)
			got := lines(Diff(old, new, c.contextual, annotations(c.updates)))
			if got != c.want {
				t.Errorf("got:\n%s\nwant:\n%s", got, c.want)
			}
		})
	}
}

// TestDiffOfPreferences changes a weight and a target: what stays is known by its
// attribute, and is edited.
func TestDiffOfPreferences(t *testing.T) {
	job := func(weight, percent int) *cluster.Job {
		j := mustJob(t, small(""))
		j.Affinities = []*cluster.Affinity{{LTarget: "${meta.rack}", Operand: "=", RTarget: "r1", Weight: weight}}
		j.TaskGroups[0].Spreads = []*cluster.Spread{{
			Attribute: "${meta.rack}", Weight: 50,
			SpreadTarget: []*cluster.SpreadTarget{{Value: "r1", Percent: 10}, {Value: "r2", Percent: percent}},
		}}
		return j
	}
	const want = `~ job small
~ Affinity {
  ~ Weight: "50" => "-5"
~ group g
  ~ Spread {
    ~ SpreadTarget {
      ~ Percent: "20" => "30"
  = task t
`
	if got := lines(Diff(job(50, 20), job(-5, 30), false, nil)); got != want {
		t.Errorf("got:\n%s\nwant:\n%s", got, want)
	}
}

func TestDiffOfDeletedJob(t *testing.T) {
	got := lines(Diff(mustJob(t, small("")), nil, false, annotations(cluster.DesiredUpdates{Stop: 1})))
	for _, want := range []string{
		"- job small\n", "- Priority: \"50\" => \"\"\n", "- group g map[destroy:1]\n", `  - Count: "1" => "" ["forces destroy"]`, `  - task t ["forces destroy"]`,
	} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in:\n%s", want, got)
		}
	}
}

// TestDiffOfPinnedModel shows a new digest behind an unchanged name.
func TestDiffOfPinnedModel(t *testing.T) {
	job := func(version uint64, digest string) *cluster.Job {
		j := mustJob(t, full)
		m := j.TaskGroups[0].Tasks[0].Model
		m.Version, m.Digest = version, digest
		return j
	}
	got := lines(Diff(job(1, "sha256:aa"), job(2, "sha256:bb"), false, nil))
	if want := "  ~ task serve\n    ~ Model {\n      ~ Digest: \"sha256:aa\" => \"sha256:bb\"\n      ~ Version: \"1\" => \"2\"\n"; !strings.Contains(got, want) {
		t.Errorf("no\n%s in:\n%s", want, got)
	}
	if d := Diff(job(1, "sha256:aa"), job(0, ""), false, nil); d.Type != diffNone {
		t.Errorf("a job that has not pinned its model differs:\n%s", lines(d))
	}
}

// TestDiffOnTheWire checks the JSON that the nomad command reads: null for empty
// lists, and notes only where there was a plan.
func TestDiffOnTheWire(t *testing.T) {
	old, new := mustJob(t, small("")), mustJob(t, small(""))
	new.TaskGroups[0].Count = 2
	got, err := json.Marshal(Diff(old, new, true, nil))
	if err != nil {
		t.Fatal(err)
	}
	const want = `{"Type":"Edited","ID":"small","Fields":null,"Objects":null,"TaskGroups":[` +
		`{"Type":"Edited","Name":"g","Fields":[{"Type":"Edited","Name":"Count","Old":"1","New":"2","Annotations":null}],` +
		`"Objects":null,"Tasks":[{"Type":"None","Name":"t","Fields":null,"Objects":null,"Annotations":null}],"Updates":null}]}`
	if string(got) != want {
		t.Errorf("got:\n%s\nwant:\n%s", got, want)
	}
}
