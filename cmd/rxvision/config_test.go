package main

import (
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

// daemon is a command with a flag of each kind.
func daemon() *cobra.Command {
	cmd := &cobra.Command{Use: "daemon", RunE: func(*cobra.Command, []string) error { return nil }}
	f := cmd.Flags()
	f.String("data-dir", "here", "")
	f.Int("bootstrap-expect", 0, "")
	f.StringSlice("retry-join", []string{"default:1"}, "")
	f.Bool("acl", true, "")
	f.Duration("gc-eval-threshold", 0, "")
	f.String("tls-cert", "", "")
	f.String("log-level", "info", "")
	addConfig(cmd, func() error { return nil }, "log-level")
	return cmd
}

func writeConfig(t *testing.T, name, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestConfigOrder(t *testing.T) {
	file := writeConfig(t, "server.hcl", `
data_dir = "/srv"
bootstrap_expect = 3
retry_join = ["a:1", "b:2"]
acl = false
gc { eval_threshold = "2h" }
tls {
  cert = "file.pem"
}
`)
	later := writeConfig(t, "later.hcl", `bootstrap_expect = 5`)
	t.Setenv("RXVISION_DATA_DIR", "/env")
	cmd := daemon()
	if err := cmd.ParseFlags([]string{"--config", file, "--config", later, "--tls-cert", "flag.pem"}); err != nil {
		t.Fatal(err)
	}
	if err := flagsFromEnv(cmd); err != nil {
		t.Fatal(err)
	}
	if err := loadConfig(cmd); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		"data-dir": "/env", "bootstrap-expect": "5", "retry-join": "[a:1,b:2]", "acl": "false",
		"gc-eval-threshold": "2h0m0s", "tls-cert": "flag.pem", "log-level": "info",
	} {
		if got := cmd.Flags().Lookup(name).Value.String(); got != want {
			t.Errorf("%s is %s, want %s", name, got, want)
		}
	}
}

func TestConfigTellsAllFaults(t *testing.T) {
	file := writeConfig(t, "bad.hcl", `
bootstrap_expekt = 3
bootstrap_expect = "three"
acl = "perhaps"
retry_join = [["nested"]]
data_dir = null
config = "self.hcl"
tls "label" { cert = "x" }
gc { eval_threshold = 5 }
log_level = unknown_variable
`)
	broken := writeConfig(t, "broken.hcl", `data_dir = `)
	empty := t.TempDir()
	cmd := daemon()
	if err := cmd.ParseFlags([]string{"--config", file, "--config", broken, "--config", empty, "--config", "/nowhere"}); err != nil {
		t.Fatal(err)
	}
	err := loadConfig(cmd)
	if err == nil {
		t.Fatal("bad files were taken")
	}
	for _, want := range []string{
		`bad.hcl:2,1-17: there is no setting "bootstrap_expekt"; did you mean "bootstrap_expect"?`,
		`bad.hcl:3,1-17: bootstrap_expect: "three" does not fit`,
		`bad.hcl:4,1-4: acl: "perhaps" does not fit`,
		`bad.hcl:5,1-11: retry_join: a tuple does not fit here`,
		`bad.hcl:6,1-9: data_dir: it has no value`,
		`bad.hcl:7,1-7: there is no setting "config"`,
		`block "tls" takes no label`,
		`gc_eval_threshold: "5" does not fit`,
		`bad.hcl:10,13-29: Variables not allowed`,
		`broken.hcl:1`,
		"the folder has no *.hcl file",
		"/nowhere",
	} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("not told: %s", want)
		}
	}
	if t.Failed() {
		t.Log(err)
	}
}

func TestReload(t *testing.T) {
	file := writeConfig(t, "server.hcl", "log_level = \"info\"\ndata_dir = \"/a\"\n")
	cmd := daemon()
	if err := cmd.ParseFlags([]string{"--config", file, "--acl=false"}); err != nil {
		t.Fatal(err)
	}
	if err := loadConfig(cmd); err != nil {
		t.Fatal(err)
	}
	applied := map[string]string{}
	r := &reload{cmd: cmd, fresh: daemon, log: slog.New(slog.NewTextHandler(t.Output(), nil)), apply: func(name, value string) error {
		applied[name] = value
		return nil
	}}
	rewrite := func(text string) {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	rewrite("log_level = \"debug\"\nnonsense = 1\n")
	if err := r.once(); err == nil || len(applied) > 0 {
		t.Fatalf("a bad file was taken: %v, %v", err, applied)
	}
	rewrite("log_level = \"debug\"\ndata_dir = \"/b\"\nacl = true\n")
	if err := r.once(); err != nil {
		t.Fatal(err)
	}
	if len(applied) != 1 || applied["log-level"] != "debug" {
		t.Errorf("applied %v, want the log level only", applied)
	}
	for name, want := range map[string]string{"log-level": "debug", "data-dir": "/a", "acl": "false"} {
		if got := cmd.Flags().Lookup(name).Value.String(); got != want {
			t.Errorf("%s is %s after the reload, want %s", name, got, want)
		}
	}
}

// TestCommandLineTellsAllFaults: flags that cannot be parsed are told together, with
// what is wrong in the environment and in files.
func TestCommandLineTellsAllFaults(t *testing.T) {
	file := writeConfig(t, "server.hcl", "job_gc_interval = \"soon\"\nfloor = 3\n")
	t.Setenv("RXVISION_EVAL_GC_THRESHOLD", "later")
	for name, c := range map[string]struct {
		args []string
		want []string
		not  string
	}{
		"values": {
			[]string{"server", "--bootstrap-expect", "three", "-job-gc-threshold=never", "--acl=perhaps", "--config", file},
			[]string{`--bootstrap-expect "three"`, `--job-gc-threshold "never"`, `--acl "perhaps"`, "RXVISION_EVAL_GC_THRESHOLD", "job_gc_interval", "floor"},
			"",
		},
		"an unknown flag": {
			[]string{"server", "--bootstrap-expect", "three", "--flour", "3", "--config", file},
			[]string{`--bootstrap-expect "three"`, "unknown flag: --flour"},
			"EVAL_GC",
		},
	} {
		var out, errOut strings.Builder
		if code := run(t.Context(), c.args, &out, &errOut); code != exitError {
			t.Errorf("%s: exit code %d", name, code)
		}
		for _, want := range c.want {
			if strings.Count(errOut.String(), want) != 1 {
				t.Errorf("%s: %q is not told once in\n%s", name, want, errOut.String())
			}
		}
		if c.not != "" && strings.Contains(errOut.String(), c.not) {
			t.Errorf("%s: %q is told in\n%s", name, c.not, errOut.String())
		}
	}
}
