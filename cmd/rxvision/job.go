package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/rxvision/rxvision/api"
	"github.com/rxvision/rxvision/jobspec"
)

func newJob() *cobra.Command {
	cmd := &cobra.Command{Use: "job", Short: "Run, watch and stop jobs"}
	cmd.AddCommand(newJobRun(), newJobStatus(), newJobStop(), newJobExplain(), newJobWhatIf())
	return cmd
}

// maxJobFile bounds a job file, in bytes.
const maxJobFile = 1 << 20

func newJobRun() *cobra.Command {
	var (
		c        clientFlags
		detach   bool
		vars     []string
		varFiles []string
	)
	cmd := &cobra.Command{
		Use:   "run FILE",
		Short: "Submit a job and watch it until it is placed and healthy",
		Long: `Parses the job file (Nomad's job specification, HCL or JSON), reports every fault at
once with its line, submits it and watches its deployment. FILE - is standard input.
Exit code 2 means that the job is registered but could not be placed whole.`,
		Example: "  rxvision job run jobs/examples/fashion.nomad.hcl",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			client, err := c.client()
			if err != nil {
				return err
			}
			out := cmd.OutOrStdout()
			registered, err := submit(cmd.Context(), client, args[0], jobspec.ParseOptions{
				Vars: vars, VarFiles: varFiles, Env: os.Environ(), AllowFS: true,
			})
			if err != nil {
				return err
			}
			if registered.Warnings != "" {
				fmt.Fprintln(cmd.ErrOrStderr(), registered.Warnings)
			}
			if c.json {
				return printJSON(out, registered)
			}
			if registered.EvalID == "" {
				fmt.Fprintln(out, "registered; it runs when it is dispatched, or at its times")
				return nil
			}
			fmt.Fprintf(out, "evaluation %s\n", registered.EvalID)
			if detach {
				return nil
			}
			return watchJob(cmd.Context(), client, registered.EvalID, out)
		},
	}
	c.add(cmd)
	cmd.Flags().BoolVar(&detach, "detach", false, "do not watch")
	cmd.Flags().StringArrayVar(&vars, "var", nil, "NAME=VALUE for a variable of the job file")
	cmd.Flags().StringArrayVar(&varFiles, "var-file", nil, "file of variables")
	return cmd
}

// submit reads a job file and registers it.
func submit(ctx context.Context, client *api.Client, path string, o jobspec.ParseOptions) (*api.Registered, error) {
	src, err := readJobFile(path)
	if err != nil {
		return nil, err
	}
	job, _, err := jobspec.Parse(path, src, o)
	if err != nil {
		return nil, err
	}
	source, err := jobspec.Submission(src, o)
	if err != nil {
		return nil, err
	}
	return client.RegisterJob(ctx, job, source)
}

func readJobFile(path string) ([]byte, error) {
	var r io.Reader = os.Stdin
	if path != "-" {
		f, err := os.Open(path)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		r = f
	}
	src, err := io.ReadAll(io.LimitReader(r, maxJobFile+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	if len(src) > maxJobFile {
		return nil, fmt.Errorf("%s is larger than %s, the limit of a job file", path, bytesText(maxJobFile))
	}
	return src, nil
}

const pollEvery = 100 * time.Millisecond

// watchJob follows an evaluation and then its deployment to their ends.
func watchJob(ctx context.Context, client *api.Client, evalID string, out io.Writer) error {
	said := ""
	say := func(format string, args ...any) {
		if line := fmt.Sprintf(format, args...); line != said {
			said = line
			fmt.Fprintln(out, line)
		}
	}
	deployment, unplaced := "", false
	for {
		e, err := client.Evaluation(ctx, evalID)
		if err != nil {
			return err
		}
		switch e.Status {
		case "complete":
			for _, group := range sortedKeys(e.FailedTGAllocs) {
				m := e.FailedTGAllocs[group]
				unplaced = true
				say("group %s: %d not placed: %s", group, m.CoalescedFailures+1, whyUnplaced(m.NodesEvaluated, m.ConstraintFiltered, m.DimensionExhausted))
			}
			deployment = e.DeploymentID
		case "failed", "canceled":
			return fmt.Errorf("evaluation %s: %s", e.Status, e.StatusDescription)
		default:
			if err := pause(ctx); err != nil {
				return err
			}
			continue
		}
		break
	}
	if unplaced {
		fmt.Fprintln(out, "the rest is placed as soon as there is room")
		return exitCode(exitUnplaced)
	}
	if deployment == "" {
		say("placed")
		return nil
	}
	for {
		d, err := client.Deployment(ctx, deployment)
		if err != nil {
			return err
		}
		var groups []string
		for _, g := range sortedKeys(d.TaskGroups) {
			s := d.TaskGroups[g]
			groups = append(groups, fmt.Sprintf("%s %d/%d healthy", g, s.HealthyAllocs, s.DesiredTotal))
		}
		say("deployment %s %s: %s", short(d.ID), d.Status, strings.Join(groups, ", "))
		switch d.Status {
		case "successful":
			return nil
		case "failed", "cancelled":
			return errors.New(d.StatusDescription + reasons(ctx, client, d.JobID))
		}
		if err := pause(ctx); err != nil {
			return err
		}
	}
}

func pause(ctx context.Context) error {
	select {
	case <-time.After(pollEvery):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func whyUnplaced(nodes int, filtered, exhausted map[string]int) string {
	var why []string
	for _, m := range []map[string]int{filtered, exhausted} {
		for _, k := range sortedKeys(m) {
			why = append(why, fmt.Sprintf("%s (%d nodes)", k, m[k]))
		}
	}
	if nodes == 0 {
		why = append(why, "no node is ready in the job's datacenters and node pool")
	}
	return strings.Join(why, ", ")
}

// reasons gives the last event of each failed task of a job.
func reasons(ctx context.Context, client *api.Client, jobID string) string {
	allocs, err := client.JobAllocations(ctx, jobID)
	if err != nil {
		return ""
	}
	var out strings.Builder
	for _, a := range allocs {
		for _, task := range sortedKeys(a.TaskStates) {
			for _, ev := range slices.Backward(a.TaskStates[task].Events) {
				if strings.Contains(ev.Type, "Terminated") || strings.Contains(ev.Type, "Fail") {
					fmt.Fprintf(&out, "\n  allocation %s task %s: %s: %s", short(a.ID), task, ev.Type, ev.DisplayMessage)
					break
				}
			}
		}
	}
	return out.String()
}

func newJobStatus() *cobra.Command {
	var c clientFlags
	cmd := &cobra.Command{
		Use: "status [JOB]", Short: "List jobs, or show one with its allocations", Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			client, err := c.client()
			if err != nil {
				return err
			}
			if len(args) == 1 {
				return showJob(cmd.Context(), client, args[0], c.json, cmd.OutOrStdout())
			}
			jobs, err := client.Jobs(cmd.Context(), "")
			if err != nil {
				return err
			}
			if c.json {
				return printJSON(cmd.OutOrStdout(), jobs)
			}
			if len(jobs) == 0 {
				_, err := fmt.Fprintln(cmd.OutOrStdout(), "no jobs; run one with `rxvision job run FILE`")
				return err
			}
			var rows [][]string
			for _, j := range jobs {
				status := j.Status
				if j.Stop {
					status += " (stopped)"
				}
				rows = append(rows, []string{j.ID, j.Type, strconv.Itoa(j.Priority), status, timeText(j.SubmitTime)})
			}
			return table(cmd.OutOrStdout(), "ID|TYPE|PRIORITY|STATUS|SUBMITTED (UTC)", rows)
		},
	}
	c.add(cmd)
	return cmd
}

func showJob(ctx context.Context, client *api.Client, id string, asJSON bool, out io.Writer) error {
	job, err := client.Job(ctx, id)
	if err != nil {
		return fmt.Errorf("job %q: %w", id, err)
	}
	allocs, err := client.JobAllocations(ctx, id)
	if err != nil {
		return err
	}
	deployment, err := client.JobDeployment(ctx, id)
	if err != nil {
		return err
	}
	if asJSON {
		return printJSON(out, map[string]any{"Job": job, "Allocations": allocs, "Deployment": deployment})
	}
	fmt.Fprintf(out, "id        %s\ntype      %s\nstatus    %s\nversion   %d\n", *job.ID, *job.Type, *job.Status, *job.Version)
	if deployment != nil {
		fmt.Fprintf(out, "deployment %s %s: %s\n", short(deployment.ID), deployment.Status, deployment.StatusDescription)
	}
	slices.SortFunc(allocs, func(a, b *api.AllocationStub) int { return cmp.Compare(b.CreateTime, a.CreateTime) })
	var rows [][]string
	for _, a := range allocs {
		rows = append(rows, []string{short(a.ID), a.TaskGroup, strconv.FormatUint(a.JobVersion, 10), a.DesiredStatus, a.ClientStatus, a.NodeName, timeText(a.CreateTime)})
	}
	fmt.Fprintln(out)
	return table(out, "ALLOCATION|GROUP|VERSION|DESIRED|STATUS|NODE|CREATED (UTC)", rows)
}

func newJobStop() *cobra.Command {
	var (
		c             clientFlags
		purge, detach bool
	)
	cmd := &cobra.Command{
		Use: "stop JOB", Short: "Stop a job", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			client, err := c.client()
			if err != nil {
				return err
			}
			r, err := client.StopJob(cmd.Context(), args[0], purge)
			if err != nil {
				return err
			}
			if r.JobModifyIndex == 0 {
				return fmt.Errorf("job %q: not found", args[0])
			}
			if c.json {
				return printJSON(cmd.OutOrStdout(), r)
			}
			if r.EvalID == "" {
				fmt.Fprintln(cmd.OutOrStdout(), "stopped; what was dispatched or launched from it goes on")
				return nil
			}
			fmt.Fprintf(cmd.OutOrStdout(), "evaluation %s\n", r.EvalID)
			if detach {
				return nil
			}
			for {
				e, err := client.Evaluation(cmd.Context(), r.EvalID)
				if err != nil {
					return err
				}
				switch e.Status {
				case "complete":
					fmt.Fprintln(cmd.OutOrStdout(), "stopped")
					return nil
				case "failed", "canceled":
					return fmt.Errorf("evaluation %s: %s", e.Status, e.StatusDescription)
				}
				if err := pause(cmd.Context()); err != nil {
					return err
				}
			}
		},
	}
	c.add(cmd)
	cmd.Flags().BoolVar(&purge, "purge", false, "forget the job and its history")
	cmd.Flags().BoolVar(&detach, "detach", false, "do not watch")
	return cmd
}
