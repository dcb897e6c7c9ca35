def write_online_report(schedule, host, directory):
    pass
